"""Unpickles into plain data: a class that is not expected becomes an object without behaviour, so
that no code of a pickle, and none that it names, can run.
"""

from __future__ import annotations

import collections
import io
import pickle
from collections.abc import Callable
from typing import Any

from pymerge.checkpoint.pickles import MOST_OPERATIONS, Refused, check_operations

Known = Callable[[str, str], Any]


class Inert:
    """Stands for an object, or for what a function would return. Takes whatever a pickle sets in it
    and keeps nothing.
    """

    __slots__ = ()

    def __new__(cls, *_: Any, **__: Any) -> Inert:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass

    add = append


def unpickled(
    content: bytes,
    known: Known,
    storage: Callable[[Any], Any] | None = None,
    most_operations: int = MOST_OPERATIONS,
) -> Any:
    """The object of a pickle.

    known: (module, name) -> what stands for that class or function; None for `Inert`. It must not
        run anything that a pickle could misuse. storage: gives what persistent ids stand for.
    most_operations: of the pickle, each of which may create an object.

    Raises `Refused` with a reason, as what is known may too, and ValueError for what is no pickle.
    """
    check_operations(content, most_operations)
    try:
        return _Unpickler(content, known, storage).load()
    except (MemoryError, Refused):
        raise
    except Exception as error:  # of the pickle's choice: its operations act on any objects
        raise ValueError(f"{type(error).__name__}: {error}") from None


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes, known: Known, storage: Callable[[Any], Any] | None) -> None:
        super().__init__(io.BytesIO(content))
        self._known = known
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        found = self._known(module, name)
        return Inert if found is None else found

    def persistent_load(self, pid: Any) -> Any:
        if self._storage is None:
            raise ValueError("refers to an object outside of it")
        return self._storage(pid)
