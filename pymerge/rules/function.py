"""Options of a method that is a function of tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from pymerge.dtypes import elements
from pymerge.rules.options import OpOptions


@dataclass(frozen=True)
class FunctionOptions(OpOptions):
    """A function that merges one tensor, with the values of its method's parameters.

    function: called as function(models, base, **values) with torch tensors of one shape; base is
        None where there is none. Returns the merged tensor, of the same shape.
    values: (parameter, its value) for shared parameters, (parameter, one value per model) for
        those of models.
    """

    op: ClassVar[str] = "function"

    function: Callable[..., Any]
    values: tuple[tuple[str, Any], ...]
    count: int
    non_finite: str

    @property
    def models(self) -> int:
        return self.count

    def memory(self, shape: tuple[int, ...]) -> int:
        """All inputs, and as many intermediate results, in fp32: an assumption."""
        return 4 * elements(shape) * 2 * (self.count + 1)

    def words(self) -> str:
        return ", ".join(f"{name} {_told(value)}" for name, value in self.values)


def _told(value: Any) -> str:
    if isinstance(value, tuple):
        return "/".join(dict.fromkeys(map(_told, value)))
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value)
