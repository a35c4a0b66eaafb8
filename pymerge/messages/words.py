"""Wording of numbers, types and lists of names in messages: of many names a few and a count."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable

_LONG = 400  # characters of a name
_MANY = 20  # values of a list


def exact(number: float) -> str:
    """`1.0000001`, `20`: a number in full, since a rounded one may look allowed."""
    return repr(float(number)).removesuffix(".0")


def counted(number: int, one: str, many: str = "") -> str:
    """`1 matrix`, `2,048 matrices`. many: the plural, where it is not the singular and an s."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


class _Shown(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxlong = self.maxother = _LONG
        self.maxtuple = self.maxlist = self.maxdict = self.maxset = self.maxfrozenset = _MANY

    def repr1(self, x: object, level: int) -> str:
        if hasattr(type(x), "__torch_function__"):
            return "tensor(...)"
        if isinstance(x, int) and abs(x) >> 4096:  # which Python refuses to print in full
            return f"<an integer of {x.bit_length()} bits>"
        return super().repr1(x, level)


_SHOWN = _Shown()


def shown(value: object) -> str:
    """`0.5`, `'word'`: a caller's value as messages repeat it, where it is long cut.

    Use it instead of `repr` for whatever a caller passed. Nothing is read from a tensor, here or in
    lists and mappings, since its memory may be gone, and no exception comes from the value's class.
    """
    return _SHOWN.repr(value)


def type_of(value: object) -> str:
    """`a list`, `an int`: a value's type with its article."""
    name = type(value).__name__
    an = name[:1].lower() in "aeio" or name == "ndarray"
    return f"{'an' if an else 'a'} {name}"


def printable(text: str) -> str:
    """Text with unprintable characters as escapes, `\\x1b`, but for line breaks: a file's name or
    content could otherwise send control sequences to the terminal.
    """
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in text
    )


def some_names(names: Iterable[object], limit: int = 4) -> str:
    """`a, b, c, d and 318 others`: at most `limit` distinct names, and a count of the rest. Names
    longer than anybody would choose are cut.
    """
    unique = list(dict.fromkeys(map(str, names)))
    rest = len(unique) - limit
    more = f" and {rest} other{'s' if rest > 1 else ''}" if rest > 0 else ""
    shown = (name if len(name) <= _LONG else f"{name[:_LONG]}..." for name in unique[:limit])
    return ", ".join(shown) + more


def names_with_verb(names: Iterable[object], one: str = "is", many: str = "are") -> str:
    """`a is`, `a, b and 3 others are`: a few names and the verb in singular or plural."""
    unique = list(dict.fromkeys(names))
    return f"{some_names(unique)} {one if len(unique) == 1 else many}"
