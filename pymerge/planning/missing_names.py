"""What the tensors that a model lacks have in common: a prefix of their names, or layers."""

from __future__ import annotations

from collections.abc import Iterable

from pymerge.messages.prefixes import by_prefix, prefixes_between
from pymerge.messages.words import some_names
from pymerge.recipe.layers import Layers

_KINDS_OF_TENSORS = 4  # kinds that recur in every layer are listed up to this number
BY_PREFIX = "names differ by the prefix"


def in_common(
    names: Iterable[str], having: Iterable[str], lacking: Iterable[str], other: str
) -> str:
    """What `names` have in common, as the end of a sentence with the way out.

    having: all names of the model that has them. lacking: all names of the model `other`, which
        lacks them.

    `; names differ by the prefix 'model.': all of them begin with it, ...; WAY OUT`, `; these are
    layers 24 to 31; WAY OUT`.
    """
    unique, ours, theirs = (list(dict.fromkeys(each)) for each in (names, having, lacking))
    prefixes = prefixes_between(ours, theirs)
    if prefixes is not None:
        return (
            f"; names differ {_of_prefixes(unique, *prefixes, other)}; load both with the same"
            " class of transformers and save them again"
        )
    layers = _by_layer(unique, ours, theirs)
    way = "merge models of one architecture only"
    few = 4 * len(unique) <= len(ours) and set(theirs) <= set(ours)
    if few and _in_common_layers(unique, ours, theirs):
        way += f", or add these to {other} where it was saved without them"
    return f"{layers and '; '}{layers}; {way}"


def _in_common_layers(names: list[str], ours: list[str], theirs: list[str]) -> bool:
    """Whether all of these are inside layers that the other model has too."""
    layers, others = Layers(ours), Layers(theirs)
    places = map(layers.place, names)
    return all(p is not None and p.index < others.counts.get(p.stack, 0) for p in places)


def _of_prefixes(names: list[str], mine: str, its: str, other: str) -> str:
    if not mine:
        return by_prefix(mine, its, "these", f"most names of {other}")
    count = sum(name.startswith(mine) for name in names)
    share = "all" if count == len(names) else f"{count:,}"
    return by_prefix(mine, its, f"{share} of them", f"the names of {other}")


def _by_layer(names: list[str], ours: list[str], theirs: list[str]) -> str:
    layers, other_layers = Layers(ours), Layers(theirs)
    places = [place for place in map(layers.place, names) if place is not None]
    if 2 * len(places) <= len(names) or len({place.stack for place in places}) > 1:
        return ""
    indices = {place.index for place in places}
    others = {
        place.index
        for place in map(other_layers.place, theirs)
        if place is not None and place.stack == places[0].stack
    }
    these = "these are" if len(places) == len(names) else f"{len(places):,} of them are"
    where = f"layer{'' if len(indices) == 1 else 's'} {_ranges(indices)}"
    if others.isdisjoint(indices):
        return f"{these} {where}"
    kinds = dict.fromkeys(place.rest for place in places)
    if len(indices) > 1 and len(kinds) <= _KINDS_OF_TENSORS:
        return f"{these} {' and '.join(kinds)} of {where}"
    return f"{these} in {where}"


def _ranges(numbers: Iterable[int]) -> str:
    """`0 to 3, 7, 9`"""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return some_names(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
