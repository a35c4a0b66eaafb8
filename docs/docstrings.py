"""Docstrings as this package writes them, as Markdown.

A paragraph whose lines begin with names of arguments, `density: fraction kept`, becomes a list of
them; a page of the documentation that is named becomes a link to it.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

FIELD = re.compile(r"(\w+(?:, \w+)*): (.*)")
PAGE = re.compile(r"\bdocs/((?:spec/)?\w+\.md)\b")


class Fields(griffe.Extension):
    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        _rewrite(func, {each.name.lstrip("*") for each in func.parameters})

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        _rewrite(cls, set(cls.attributes))


def _rewrite(documented: griffe.Object, names: set[str]) -> None:
    if documented.docstring is not None:
        documented.docstring.value = as_markdown(documented.docstring.value, names)


def as_markdown(text: str, names: set[str]) -> str:
    """text: a docstring without its indentation. names: what its fields may be called."""
    lines: list[str] = []
    listed = False  # whether the last line belongs to a list of fields
    for line in text.split("\n"):
        found = FIELD.fullmatch(line)
        if found and names.issuperset(found[1].split(", ")):
            called = ", ".join(f"`{name}`" for name in found[1].split(", "))
            if not listed and lines and lines[-1]:
                lines.append("")
            lines.append(f"- {called}: {found[2]}")
            listed = True
        else:
            if listed and line and not line.startswith("    "):
                lines.append("")
                listed = False
            lines.append(line)
        listed = listed and bool(line)
    return PAGE.sub(r"[\g<0>](\1)", "\n".join(lines))
