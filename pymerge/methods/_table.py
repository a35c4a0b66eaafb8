"""The methods by name: the package's own, and those that installed packages register.

Names, defaults and scopes of mergekit's methods are those of its YAML, so an existing file keeps
its meaning. A method is one `Method` entry in the module of its family.
"""

from __future__ import annotations

import importlib
from typing import Any

from pymerge.errors import ConfigError
from pymerge.messages.arguments import argument
from pymerge.methods._statistics import BY_STATISTICS
from pymerge.methods.geometric import GEOMETRIC
from pymerge.methods.masked import MASKED
from pymerge.methods.matrix import MATRIX
from pymerge.methods.method import Method, nearest, short
from pymerge.methods.task_vectors import TASK_VECTORS

METHODS: dict[str, Method] = {
    method.name: method for method in (*TASK_VECTORS, *GEOMETRIC, *MASKED, *MATRIX, *BY_STATISTICS)
}

# Entry points of this group are methods of other packages (docs/methods.md).
GROUP = "pymerge.methods"

# Parameters that some method of mergekit has. Like mergekit, ignore them where the recipe's method
# lacks them.
KNOWN_PARAMETERS = frozenset(p.name for method in METHODS.values() for p in method.parameters)


def find_method(name: Any, key: str = "") -> Method:
    """The method of that name; ConfigError that lists the methods for any other.

    key: the recipe's key that names it; by default messages speak of the argument `method`.
    """
    if isinstance(name, str) and name in METHODS:
        return METHODS[name]
    named = f"{key} {short(name)}" if key else f"{argument('method')}={short(name)}"
    # Only now: this import takes longer than the rest of `pymerge --help`'s.
    metadata = importlib.import_module("importlib.metadata")
    others = {each.name: each for each in metadata.entry_points(group=GROUP)}
    if isinstance(name, str) and name in others:
        return _loaded(others[name], named)
    known = [*METHODS, *others]
    raise ConfigError(f"{named} is not one of {', '.join(known)}{nearest(name, known)}")


def _loaded(entry: Any, named: str) -> Method:
    """A method that an installed package registers: a `Method`, or a function that returns one."""
    where = f"{entry.value}, which an installed package registers"
    try:
        found = entry.load()
        if not isinstance(found, Method) and callable(found):
            found = found()
    except Exception as error:  # whatever the other package's code raises
        raise ConfigError(f"{named} is {where}: {type(error).__name__}: {error}") from error
    if not isinstance(found, Method) or found.name != entry.name:
        told = f"method {found.name!r}" if isinstance(found, Method) else short(found)
        raise ConfigError(
            f"{named} is {where}: it gives {told}; it has to give a pymerge.methods.Method of that"
            " name"
        )
    return found
