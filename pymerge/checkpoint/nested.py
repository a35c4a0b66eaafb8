"""Finds the model in a training loop's checkpoint, beside epochs, losses and an optimizer's state,
by what the mappings hold, one or two levels deep.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from pymerge.messages.words import some_names

_LEVELS = 2
# Usual names of the state dict, in order of preference. Averages come last: they are a model too,
# but not the weights beside them.
_NAMES = (
    *("model_state_dict", "state_dict", "model_state", "model", "module", "net", "network"),
    *(
        "params",
        "parameters",
        "weights",
        "ema_state_dict",
        "model_state_dict_ema",
        "state_dict_ema",
    ),
    *("model_ema", "ema_model", "params_ema", "ema"),
)
_OF_TRAINING = re.compile(
    r"optim|sched|scaler|rng|loss|metric|hist|args|config|hyper|callback|loops|exp_avg", re.I
)


@runtime_checkable
class Tensor(Protocol):
    """What is asked of a tensor here, which may be one of torch's or described in a file."""

    def dim(self) -> int: ...

    def numel(self) -> int: ...

    def is_floating_point(self) -> bool: ...


@dataclass(frozen=True)
class StateDict:
    """The mapping that holds a model's tensors. keys: the path to it. others: keys beside it whose
    mappings hold tensors too.
    """

    content: Mapping[Any, Any]
    keys: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def note(self) -> str | None:
        """What to note about it, as the predicate of a sentence."""
        if not self.others:
            return None
        are = "holds tensors too and is" if len(self.others) == 1 else "hold tensors too and are"
        return (
            f"the model is taken from {_path(self.keys)}; {some_names(map(repr, self.others))}"
            f" beside it {are} left out"
        )


def state_dict_in(content: Mapping[Any, Any]) -> StateDict:
    """The state dict in a mapping, or the mapping itself.

    Raises ValueError, with what is to be said after the name of the file or argument, where none
    holds tensors by their names, several do and none of them is called as models are, or tensors
    lie beside one that is.
    """
    keys: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    for level in range(_LEVELS, -1, -1):
        inner = [key for key, value in _mappings(content) if _reaches(value, level - 1)]
        known = [key for key in _NAMES if key in inner]
        direct = [n for n, value in content.items() if is_weight(value) and not _of_training(n)]
        if direct and not known:
            return StateDict(content, keys, others)
        if direct and any(content[name].is_floating_point() for name in direct):
            raise ValueError(
                f"has tensors beside its {known[0]!r} ({some_names(map(repr, direct))}); save those"
                " of the model alone"
            )
        models = [key for key in inner if key in known or not _of_training(key)]
        if not models:
            break
        if len(models) > 1 and not known:
            raise ValueError(
                f"holds tensors by several keys, {some_names(map(repr, models))}; save a flat state"
                " dict of the model alone"
            )
        key = known[0] if known else models[0]
        keys, content = (*keys, key), content[key]
        others = (*others, *(each for each in models if each != key))
    if not any(isinstance(value, Mapping) for value in content.values()):
        if any(map(_dimensions, content.values())):  # of one element each, or of such names
            return StateDict(content, keys, others)
    where = f" in {_path(keys)}" if keys else ""
    if not content:
        raise ValueError(f"holds no tensors{where}: the mapping is empty")
    raise ValueError(
        f"holds no tensors of a model{where}, by the keys {some_names(map(repr, content))}; save"
        " the state dict of the model, flat or by a key of its own such as 'model_state_dict'"
    )


def is_weight(value: Any) -> bool:
    """Whether a value is a tensor with more than one number, unlike a loss or a step."""
    return bool(_dimensions(value)) and value.numel() > 1


def _of_training(key: Any) -> bool:
    return isinstance(key, str) and bool(_OF_TRAINING.search(key))


def _dimensions(value: Any) -> int:
    return value.dim() if isinstance(value, Tensor) else 0


def _mappings(content: Mapping[Any, Any]) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, Mapping):
            yield key, value


def _reaches(content: Mapping[Any, Any], levels: int) -> bool:
    """Whether there are tensors under text keys, at most that many levels deeper."""
    if levels < 0:
        return False
    if any(isinstance(key, str) and is_weight(value) for key, value in content.items()):
        return True
    return any(_reaches(value, levels - 1) for _, value in _mappings(content))


def _path(keys: tuple[str, ...]) -> str:
    """`'model' -> 'state_dict'`"""
    return " -> ".join(map(repr, keys))
