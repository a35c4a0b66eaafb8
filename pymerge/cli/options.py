"""Types of command line options."""

from __future__ import annotations

import re
from typing import Any

import click


class WholeNumber(click.IntRange):
    """An integer in the digits 0 to 9. Python takes those of every script, and underscores."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and not re.fullmatch(r"\s*[+-]?[0-9]+\s*", value):
            self.fail(f"{value!r} is not a valid integer.", param, ctx)
        return super().convert(value, param, ctx)
