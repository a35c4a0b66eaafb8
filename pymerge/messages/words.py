"""How messages speak of numbers and of many names: a few of them and a count, and the prefix in
which two sets of names differ.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

MOST_PARTS = 12  # of a prefix; `_fsdp_wrapped_module._orig_mod.base_model.model.` has four
_LONG = 400  # characters of a name
_NUMBER = re.compile(r"\d+")


def exact(number: float) -> str:
    """A number as it is, `1.0000001` and `20`: a rounded one may look allowed."""
    return repr(float(number)).removesuffix(".0")


def counted(number: int, one: str, many: str = "") -> str:
    """`1 matrix`, `2 matrices`: a number of things; many: their plural, where it is not by an s."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def type_of(value: object) -> str:
    """`a list`, `an int`: what a value is, with the article."""
    name = type(value).__name__
    an = name[:1].lower() in "aeio" or name == "ndarray"
    return f"{'an' if an else 'a'} {name}"


def printable(text: str) -> str:
    """For a terminal, which letters of a file's name or content could steer: such as these are
    shown as escapes, `\\x1b`. Lines stay lines.
    """
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in text
    )


def some_names(names: Iterable[object], limit: int = 4) -> str:
    """`a, b, c, d and 318 others`: at most `limit` names, each once, and a count of the rest. Of a
    name that nobody gave anything its beginning says enough.
    """
    unique = list(dict.fromkeys(map(str, names)))
    rest = len(unique) - limit
    more = f" and {rest} other{'s' if rest > 1 else ''}" if rest > 0 else ""
    shown = (name if len(name) <= _LONG else f"{name[:_LONG]}..." for name in unique[:limit])
    return ", ".join(shown) + more


def beginning(names: Iterable[object]) -> str:
    """The prefix that all of several names have, as `model.layers.`; "" where they have none, or
    there is one name alone.
    """
    parts = [str(name).split(".")[:-1] for name in names]
    if len(parts) < 2:
        return ""
    common = []
    for same in zip(*parts, strict=False):
        if len(set(same)) > 1:
            break
        common.append(same[0])
    return "".join(f"{part}." for part in common)


def prefixes_between(one: Iterable[object], other: Iterable[object]) -> tuple[str, str] | None:
    """The prefix of the names in `one` and that of those in `other` but for which most of them are
    equal; either may be "".

    None where no pair of prefixes makes more than half of both sets equal, or they differ in
    numbers alone. A prefix ends with a dot, as in `model.layers.0.weight`.
    """
    ones, others = set(map(str, one)), set(map(str, other))
    best: tuple[int, str, str] = (max(len(ones), len(others)) // 2, "", "")
    for mine in _prefixes(ones):
        bare = {name.removeprefix(mine) for name in ones if name.startswith(mine)}
        for its in _prefixes(others):
            if mine and are_numbered_alike(mine, its):
                continue
            equal = sum(name.removeprefix(its) in bare for name in others if name.startswith(its))
            if equal > best[0]:
                best = (equal, mine, its)
    return best[1:] if best[1] or best[2] else None


def are_numbered_alike(one: str, other: str) -> bool:
    """Whether two prefixes are the same but for numbers: of the same thing, or of another layer,
    expert or tower, whose weights are others.
    """
    return _NUMBER.sub("", one) == _NUMBER.sub("", other)


def _prefixes(names: set[str]) -> list[str]:
    """Those that more than half of the names have, the shortest first: "" is one. All are tried
    with all of another set, so there are no longer ones than honest models have.
    """
    found = [""]
    while len(found) <= MOST_PARTS:
        start = len(found[-1])
        longer = Counter(
            name[: name.index(".", start) + 1]
            for name in names
            if name.startswith(found[-1]) and "." in name[start:]
        )
        prefix, count = max(longer.items(), key=lambda item: item[1], default=("", 0))
        if 2 * count <= len(names):
            return found
        found.append(prefix)
    return found
