"""How the names and shapes of state dicts differ: a few sentences, however many names there are."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch

from pymerge.messages.arguments import of_model
from pymerge.messages.prefixes import by_prefix, common_prefix, prefixes_between
from pymerge.messages.words import counted, some_names

StateDict = Mapping[str, torch.Tensor]
# A tensor that is copied and not merged: its name, its dtype, and the models where it differs.
NotMerged = tuple[str, torch.dtype, Sequence[int]]

# At most so many names, and so many differences of a kind, are listed.
_SHOWN = 4


def differences(
    labels: Sequence[str], models: Sequence[StateDict], like: StateDict, like_name: str
) -> list[str]:
    """Sentences on each difference of the models from `like`, which messages call `like_name`."""
    names, way_out = _of_names(labels, models, like, like_name)
    shapes = [
        sentence
        for label, model in zip(labels, models, strict=True)
        for sentence in _of_shapes(label, model, like, like_name)
    ]
    return [*_some(names, _SHOWN), *_some(shapes, 2 * _SHOWN), *way_out]


def _some(sentences: list[str], limit: int) -> list[str]:
    rest = len(sentences) - limit
    return sentences[:limit] + ([f"and {rest} more of the kind"] if rest > 0 else [])


def _of_names(
    labels: Sequence[str], models: Sequence[StateDict], like: StateDict, like_name: str
) -> tuple[list[str], list[str]]:
    """(sentences, ways out): one sentence for all models that differ in the same way."""
    groups: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
    for label, model in zip(labels, models, strict=True):
        missing = tuple(name for name in like if name not in model)
        extra = tuple(name for name in model if name not in like)
        if missing or extra:
            groups.setdefault((missing, extra), []).append(label)
    found = []
    left_out = False
    for (missing, extra), which in groups.items():
        who, several = some_names(which), len(which) > 1
        pair = prefixes_between(extra, missing)
        if pair is not None:
            lacked = {str(name).removeprefix(pair[1]) for name in missing}
            had = {str(name).removeprefix(pair[0]) for name in extra}
            found.append(_of_prefixes(who, like_name, pair, len(lacked & had)))
            missing = tuple(n for n in missing if str(n).removeprefix(pair[1]) not in had)
            extra = tuple(n for n in extra if str(n).removeprefix(pair[0]) not in lacked)
        if missing:
            few = len(missing) <= _SHOWN
            many = f"{len(missing)} of {like_name}'s {len(like)} names: "
            found.append(
                f"{who} lack{'' if several else 's'} {'' if few else many}{_listed(missing)}"
            )
        if extra:
            many = "" if len(extra) <= _SHOWN else f"{len(extra)} names that {like_name} lacks: "
            tail = "" if many else f", which {like_name} lacks"
            found.append(f"{who} {'have' if several else 'has'} {many}{_listed(extra)}{tail}")
        left_out = left_out or bool(missing or extra)
    return found, ["leave out of each what another lacks"] if left_out else []


def _listed(names: Sequence[str]) -> str:
    """A few of the names; of more, also the prefix that all share."""
    start = common_prefix(names) if len(names) > _SHOWN else ""
    return some_names(names, _SHOWN) + (f" (all begin with {start!r})" if start else "")


def _of_prefixes(who: str, like_name: str, pair: tuple[str, str], count: int) -> str:
    """pair: the prefixes of the models' names and of those of `like`."""
    mine, its = pair
    differ = "differs" if count == 1 else "differ"
    said = by_prefix(mine, its, f"those of {who}", f"those of {like_name}")
    way_out = "give all the same one"
    if not (mine and its):
        way_out = (
            f"take it off: {{name.removeprefix({mine or its!r}): x for name, x in"
            " state_dict.items()}"
        )
    return f"{counted(count, 'name')} of {who} and {like_name} {differ} {said}; {way_out}"


def _of_shapes(label: str, model: StateDict, like: StateDict, like_name: str) -> list[str]:
    different = [name for name in like if name in model and model[name].shape != like[name].shape]
    found = [
        f"{name} has shape {tuple(model[name].shape)} in {label}, {tuple(like[name].shape)} in"
        f" {like_name}"
        for name in different[:_SHOWN]
    ]
    rest = len(different) - len(found)
    if rest:
        have = "has another shape" if rest == 1 else "have other shapes"
        found.append(f"{rest} more {have} in {label} than in {like_name}")
    return found


def warn_of_not_merged(found: Sequence[NotMerged], of_base: bool, stacklevel: int) -> None:
    """One UserWarning for all integer, bool and complex tensors that differ between the models.

    of_base: whether the base's are taken, else the first model's.
    """
    if not found:
        return
    which = some_names(of_model("models", k) for k in sorted({k for _, _, ks in found for k in ks}))
    dtypes = some_names(dtype for _, dtype, _ in found)
    whose = "the base's" if of_base else "the first model's"
    if len(found) == 1:
        text = f"tensor {found[0][0]!r} is {dtypes} and differs in {which}; {whose} is taken"
    else:
        names = some_names(repr(name) for name, _, _ in found)
        text = (
            f"{len(found)} tensors are not merged ({dtypes}) and differ in {which}: {names};"
            f" {whose} are taken"
        )
    warnings.warn(text, stacklevel=stacklevel + 1)
