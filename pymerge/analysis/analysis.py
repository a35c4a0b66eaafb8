"""The result of an analysis: figures by tensor, by layer, by kind of module and of all together."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pymerge.analysis.figures import DENSITIES, Figures
from pymerge.analysis.html import BEGIN
from pymerge.checkpoint import new_file
from pymerge.checkpoint.types import Source
from pymerge.messages.arguments import argument
from pymerge.messages.words import exact, shown, type_of
from pymerge.planning.plan import Plan, PlannedTensor
from pymerge.recipe.layers import Layers
from pymerge.version import __version__

# How the JSON file and the page begin, by which they are known.
_OWN_DATA = re.compile(rb'\{\n "version": "[^"\n]*",\n "method": "')
_OWN_PAGE = re.compile(re.escape(BEGIN.encode()))


@dataclass(frozen=True)
class TensorAnalysis:
    """One tensor. layer: the block that it belongs to, "" outside of all; kind: its module's name
    there. places: of its models among those of the analysis.
    """

    name: str
    shape: tuple[int, ...]
    method: str
    layer: str
    kind: str
    places: tuple[int, ...]
    figures: Figures


@dataclass
class Analysis:
    """What `pymerge.analyze` and `pymerge.analyze_checkpoints` return (docs/analyze.md).

    models: their names, in the order of all figures. base: its name, None where no task vectors are
    taken. densities: at which the share of the mass is given. tensors: in the order of the result;
    those that are copied are not among them. Shows itself in notebooks.
    """

    method: str
    models: tuple[str, ...]
    base: str | None
    densities: tuple[float, ...] = DENSITIES
    tensors: list[TensorAnalysis] = field(default_factory=list, repr=False)

    @property
    def total(self) -> Figures:
        """Of all tensors."""
        return self._together(lambda tensor: "").get("", Figures(len(self.models), self.densities))

    @property
    def layers(self) -> dict[str, Figures]:
        """Of each layer, in the order of the tensors; without what is in none."""
        found = self._together(lambda tensor: tensor.layer)
        return {name: each for name, each in found.items() if name}

    @property
    def kinds(self) -> dict[str, Figures]:
        """Of each kind of module, over all layers."""
        return self._together(lambda tensor: tensor.kind)

    def _together(self, key: Callable[[TensorAnalysis], str]) -> dict[str, Figures]:
        found: dict[str, Figures] = {}
        for tensor in self.tensors:
            group = found.setdefault(key(tensor), Figures(len(self.models), self.densities))
            group.include(tensor.figures, tensor.places)
        return found

    def of(self, tensor: TensorAnalysis) -> Figures:
        """A tensor's figures in the order of all models."""
        found = Figures(len(self.models), self.densities)
        found.include(tensor.figures, tensor.places)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in the JSON file; what is not known is None."""

        def listed(groups: dict[str, Figures]) -> list[dict[str, Any]]:
            return [{"name": name, **each.to_dict()} for name, each in groups.items()]

        return {
            "version": __version__,
            "method": self.method,
            "models": list(self.models),
            "base": self.base,
            "densities": list(self.densities),
            "total": self.total.to_dict(),
            "layers": listed(self.layers),
            "kinds": listed(self.kinds),
            "tensors": [
                {
                    "name": tensor.name,
                    "shape": list(tensor.shape),
                    "method": tensor.method,
                    "layer": tensor.layer,
                    "kind": tensor.kind,
                    **self.of(tensor).to_dict(),
                }
                for tensor in self.tensors
            ],
        }

    def to_html(self) -> str:
        """The report as one page that needs nothing else."""
        from pymerge.analysis.html import page

        return page(self.to_dict())

    def write(self, path: str | os.PathLike[str]) -> tuple[Path, Path]:
        """Write the report to `path`, and the figures as JSON beside it under the same name.
        Returns both paths. Raises OutputError and DiskFullError.
        """
        page = Path(path)
        data = check_report(page)
        new_file.write(data, (json.dumps(self.to_dict(), indent=1) + "\n").encode())
        new_file.write(page, self.to_html().encode("utf-8", "backslashreplace"))
        return page, data

    def _repr_html_(self) -> str:
        from pymerge.analysis.html import fragment

        return fragment(self.to_dict())


def check_report(page: Path) -> Path:
    """Where the figures of a report go. ValueError where that is the report itself, OutputError
    where one of the two files cannot be written or would replace one that is none of a report:
    `recipe.json` is beside `recipe.html`.
    """
    new_file.check_own(page, _OWN_PAGE, "report of an analysis")
    if page.suffix == ".json":
        raise ValueError(f"{page} would be both the report and its figures; name the report .html")
    data = page.with_suffix(".json")
    new_file.check_own(data, _OWN_DATA, f"figures of a report, as {page} needs")
    new_file.check_place(page)
    return data


class Naming:
    """Layer and kind of a plan's tensors, and the participants of a merge.

    references: of all models of the plan. A tensor may be merged from a model more than once; each
    time is a participant of its own.
    """

    def __init__(self, plan: Plan, references: Sequence[str]) -> None:
        self._layers = Layers(tensor.name for tensor in plan.tensors)
        found: dict[tuple[int, int], int] = {}
        merged = [tensor for tensor in plan.tensors if is_merged(tensor)]
        keys = {key for tensor in merged for key in _keys(tensor.sources)}
        order = {model: place for place, model in enumerate(plan.inputs)}
        for key in sorted(keys, key=lambda key: (order.get(key[0], key[0]), key[1])):
            found[key] = len(found)
        self._places = found
        self.models = tuple(
            references[model] + (f" ({again + 1})" if again else "") for model, again in found
        )
        bases = [base_of(plan, tensor) for tensor in merged]
        known = {base.model for base in bases if base is not None}
        self.base = references[min(known)] if known else None

    def described(self, tensor: PlannedTensor, figures: Figures) -> TensorAnalysis:
        place = self._layers.place(tensor.name)
        kind = tensor.name if place is None else place.rest
        for ending in (".weight", ".bias"):
            kind = kind.removesuffix(ending)
        # Experts of a layer are of one kind.
        kind = ".".join("*" if part.isdecimal() else part for part in kind.split("."))
        layer = "" if place is None else f"{place.stack}.{place.index}"
        places = tuple(self._places[key] for key in _keys(tensor.sources))
        return TensorAnalysis(
            tensor.name, tensor.shape, tensor.method, layer, kind, places, figures
        )


def base_of(plan: Plan, tensor: PlannedTensor) -> Source | None:
    """What the task vectors of a tensor are taken from. In a merge by statistics that is the
    recipe's base model, though its solutions need none; the average, which tensors without
    statistics become, is the same with it.
    """
    if tensor.base is not None or plan.base is None:
        return tensor.base
    if all(each.solve is None for each in plan.tensors):
        return None
    return Source(plan.base, tensor.name)


def _keys(sources: Sequence[Source]) -> list[tuple[int, int]]:
    """(model, how many times it came before)."""
    seen: dict[int, int] = {}
    keys = []
    for source in sources:
        keys.append((source.model, seen.get(source.model, 0)))
        seen[source.model] = seen.get(source.model, 0) + 1
    return keys


def is_merged(tensor: PlannedTensor) -> bool:
    """Whether a tensor has models that differ: not copied, nor a factor of an adapter."""
    return tensor.factor is None and (tensor.options is not None or tensor.solve is not None)


def check_densities(densities: Sequence[float]) -> tuple[float, ...]:
    """TypeError or ValueError for what are no densities."""
    if isinstance(densities, (str, bytes)) or not isinstance(densities, Sequence):
        raise TypeError(f"{argument('densities')} is {type_of(densities)}; pass a list of numbers")
    for density in densities:
        if isinstance(density, bool) or not isinstance(density, (int, float)):
            raise TypeError(f"densities has {shown(density)}, {type_of(density)}; pass numbers")
        if not 0 <= density <= 1:
            raise ValueError(f"densities has {exact(density)}, outside [0, 1]")
    return tuple(float(density) for density in densities)
