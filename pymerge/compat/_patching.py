"""Replacing another package's functions by ours, everywhere in that package, and back."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Sequence
from types import ModuleType, TracebackType
from typing import Any

_lock = threading.RLock()


class Replacements:
    """Functions of a package and what replaces them.

    pairs: (theirs, ours), in every module of the package that has theirs under any name.
    attributes: (owner, name, ours), of classes and objects.
    """

    def __init__(
        self,
        package: str,
        pairs: Sequence[tuple[Any, Any]],
        attributes: Sequence[tuple[Any, str, Any]] = (),
    ) -> None:
        self._package = package
        self._attributes = [
            (owner, name, getattr(owner, name), ours) for owner, name, ours in attributes
        ]
        self._ours = {id(theirs): ours for theirs, ours in pairs}
        self._theirs = {id(ours): theirs for theirs, ours in pairs}
        self._pairs = pairs  # keeps both alive, whose ids are the keys
        self.is_applied = False

    def apply(self) -> Patch:
        """Put ours into their places. Nothing is done twice."""
        with _lock:
            new = not self.is_applied
            self.is_applied = True
            self._swap(self._ours)
            for owner, name, _, ours in self._attributes:
                setattr(owner, name, ours)
            return Patch(self if new else None)

    def undo(self) -> None:
        """Put theirs back, into modules too that took ours since."""
        with _lock:
            self.is_applied = False
            self._swap(self._theirs)
            for owner, name, theirs, _ in self._attributes:
                setattr(owner, name, theirs)

    def _swap(self, new: dict[int, Any]) -> None:
        for module in self._modules():
            names = vars(module)
            for name, value in [*names.items()]:
                if id(value) in new:
                    names[name] = new[id(value)]

    def _modules(self) -> Iterable[ModuleType]:
        inside = f"{self._package}."
        for name, module in [*sys.modules.items()]:
            if isinstance(module, ModuleType) and (
                name == self._package or name.startswith(inside)
            ):
                yield module


class Patch:
    """What `patch` returns: as the subject of `with` it undoes the patch at the end, unless the
    patch was there before.
    """

    def __init__(self, replacements: Replacements | None) -> None:
        self._replacements = replacements

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        if self._replacements is not None:
            self._replacements.undo()
            self._replacements = None
