"""Prefixes of tensor names, as `model.` in `model.layers.0.weight`; each ends with a dot.

Used to match the tensors of two models (`planning/name_matching.py`) and to say in what their names
differ.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

# Of a prefix. All prefixes of one set are tried with all of another, so none is longer than in
# honest models: `_fsdp_wrapped_module._orig_mod.base_model.model.` has four parts.
_MOST_PARTS = 12
_NUMBER = re.compile(r"\d+")


def common_prefix(names: Iterable[object]) -> str:
    """The longest prefix of all the names; "" where there is none, or only one name."""
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
    """The pair of prefixes, (of the names in `one`, of those in `other`), without which most names
    are equal; either may be "".

    None where no pair makes more than half of both sets equal, or they are numbered differently.
    """
    ones, others = set(map(str, one)), set(map(str, other))
    best: tuple[int, str, str] = (max(len(ones), len(others)) // 2, "", "")
    for mine in majority_prefixes(dict.fromkeys(ones, 1)):
        bare = {name.removeprefix(mine) for name in ones if name.startswith(mine)}
        for its in majority_prefixes(dict.fromkeys(others, 1)):
            if mine and are_never_matched(mine, its):
                continue
            equal = sum(name.removeprefix(its) in bare for name in others if name.startswith(its))
            if equal > best[0]:
                best = (equal, mine, its)
    return best[1:] if best[1] or best[2] else None


def by_prefix(mine: str, its: str, ones: str, others: str) -> str:
    """What is said of names that differ by the pair of prefixes that `prefixes_between` found: `by
    the prefix 'model.': all of them begin with it, the names of B do not`. ones, others: the two
    sets of names, as subjects.
    """
    if mine and its:
        return f"by the prefix: {ones} begin with {mine!r}, {others} with {its!r}"
    if its:
        ones, others = others, ones
    return f"by the prefix {mine or its!r}: {ones} begin with it, {others} do not"


def are_never_matched(one: str, other: str) -> bool:
    """Whether two prefixes are the same but for numbers, or both have numbers and other ones:
    either equal, or of another layer, expert or tower, whose weights are others.
    """
    numbers, others = _NUMBER.findall(one), _NUMBER.findall(other)
    if numbers and others and numbers != others:
        return True
    return _NUMBER.sub("", one) == _NUMBER.sub("", other)


def majority_prefixes(sizes: Mapping[str, int]) -> Iterator[str]:
    """The prefixes that cover more than half of the total size, shortest first, starting with "".
    sizes: of each name.
    """
    whole = sum(sizes.values())
    prefix = ""
    for _ in range(_MOST_PARTS + 1):
        yield prefix
        start = len(prefix)
        longer: Counter[str] = Counter()
        for name, size in sizes.items():
            end = name.find(".", start)
            if end >= 0 and name.startswith(prefix):
                longer[name[: end + 1]] += size
        prefix, size = max(longer.items(), key=lambda item: item[1], default=("", 0))
        if 2 * size <= whole:
            return
