"""Flat vectors and state dicts, for `pymerge.compat.ties_merging`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence

import torch

from pymerge.messages.words import counted, shown, some_names, type_of
from pymerge.ops.memory import check_tensor
from pymerge.ops.tensors import check_numbers

_TIED = "transformer.shared.weight"


def state_dict_to_vector(
    state_dict: Mapping[str, torch.Tensor], remove_keys: Collection[str] = ()
) -> torch.Tensor:
    """All tensors of a state dict, sorted by name, flat and concatenated, without `remove_keys`.
    ValueError where none is left.
    """
    names = _names(state_dict, remove_keys)
    if not names:
        raise ValueError("state_dict has no tensors, or remove_keys has all of their names")
    return torch.cat([state_dict[name].reshape(-1) for name in names])


def vector_to_state_dict(
    vector: torch.Tensor, state_dict: Mapping[str, torch.Tensor], remove_keys: Collection[str] = ()
) -> OrderedDict[str, torch.Tensor]:
    """The inverse of `state_dict_to_vector`, with the names and shapes of `state_dict`. ValueError
    for another length.

    Where there is "transformer.shared.weight", every one of `remove_keys` is that tensor: T5's
    tied embeddings. Otherwise they are left out.
    """
    check_tensor("vector", vector)
    names = _names(state_dict, remove_keys)
    sizes = [state_dict[name].numel() for name in names]
    if vector.numel() != sum(sizes):
        raise ValueError(
            f"vector has {counted(vector.numel(), 'element')}, the state dict {sum(sizes)}"
        )
    pieces = torch.split(vector.reshape(-1), sizes)
    found = OrderedDict(
        (name, piece.reshape(state_dict[name].shape))
        for name, piece in zip(names, pieces, strict=True)
    )
    if _TIED in found:
        found.update(dict.fromkeys(remove_keys, found[_TIED]))
    return found


def add_ptm_to_tv(
    tv_dict: Mapping[str, torch.Tensor], ptm_dict: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """tv_dict[name] + ptm_dict[name] for every name: a task vector added to the pretrained model.
    ValueError where their names differ.
    """
    for which, state in (("tv_dict", tv_dict), ("ptm_dict", ptm_dict)):
        if not isinstance(state, Mapping):
            raise TypeError(f"{which} is {type_of(state)}; pass a state dict")
    check_parameterNamesMatch([tv_dict, ptm_dict])
    for which, state in (("tv_dict", tv_dict), ("ptm_dict", ptm_dict)):
        for name, tensor in state.items():
            check_numbers(f"{which}[{name!r}]", tensor, "a sum")
    return {name: tensor + ptm_dict[name] for name, tensor in tv_dict.items()}


def check_parameterNamesMatch(checkpoints: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """ValueError that says which names not all of these state dicts have."""
    if not isinstance(checkpoints, Sequence) or not checkpoints:
        raise TypeError(f"checkpoints is {type_of(checkpoints)}; pass a list of state dicts")
    for k, checkpoint in enumerate(checkpoints):
        if not isinstance(checkpoint, Mapping):
            raise TypeError(f"checkpoints[{k}] is {type_of(checkpoint)}; pass a state dict")
    for k, checkpoint in enumerate(checkpoints[1:], 1):
        different = sorted(map(str, set(checkpoints[0]) ^ set(checkpoint)))
        if different:
            raise ValueError(
                "Differing parameter names in models. Only one of checkpoints[0] and"
                f" checkpoints[{k}] has {some_names(different)}"
            )


def check_state_dicts_equal(
    state_dict1: Mapping[str, torch.Tensor], state_dict2: Mapping[str, torch.Tensor]
) -> bool:
    """Whether two state dicts have the same names and equal tensors (NaN equals nothing)."""
    for which, state in (("state_dict1", state_dict1), ("state_dict2", state_dict2)):
        if not isinstance(state, Mapping):
            raise TypeError(f"{which} is {type_of(state)}; pass a state dict")
        for name, tensor in state.items():
            check_tensor(f"{which}[{name!r}]", tensor)
    return state_dict1.keys() == state_dict2.keys() and all(
        tensor.shape == state_dict2[name].shape and bool((tensor == state_dict2[name]).all())
        for name, tensor in state_dict1.items()
    )


def _names(state_dict: Mapping[str, torch.Tensor], remove_keys: Collection[str]) -> list[str]:
    """The sorted names without `remove_keys`. TypeError for anything but a state dict and a list of
    keys.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict is {type_of(state_dict)}; pass a state dict")
    kinds = (str, bytes, bytearray, torch.Tensor)
    if isinstance(remove_keys, kinds) or not isinstance(remove_keys, Collection):
        raise TypeError(
            f"remove_keys={shown(remove_keys)} is {type_of(remove_keys)}; pass a list of keys"
        )
    for name, tensor in state_dict.items():
        if not isinstance(name, str):
            raise TypeError(f"state_dict has the key {name!r}, {type_of(name)}; keys are text")
        if name not in remove_keys:
            check_numbers(f"state_dict[{name!r}]", tensor, "a flat vector")
    return [name for name in sorted(state_dict) if name not in remove_keys]
