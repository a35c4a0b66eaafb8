"""mergekit's methods on tensors: what a method merges, with which values, and the call of its op.

`compat.mergekit` and its patch share this.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pymerge.compat._seed import draw_seed
from pymerge.engine.mappings import merge_each
from pymerge.messages.arguments import renamed
from pymerge.messages.words import shown
from pymerge.methods import REQUIRED, Given, Method, Parameter, nearest
from pymerge.methods.values import converted, one_per_model
from pymerge.ops.tensors import check_state_dicts
from pymerge.ops.ties.api import ties
from pymerge.ops.ties.run import TensorCall
from pymerge.rules.options import OpOptions

StateDict = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Bound:
    """What a method gets: the ids of the models that it merges in order, that of the base that
    task vectors are taken from, and the values of its parameters.
    """

    keys: list[Hashable]
    base: Hashable | None
    shared: dict[str, Any]
    per_model: list[dict[str, Any]]

    def resolve(self, method: Method) -> OpOptions:
        """The op's options. ValueError for values that do not go together."""
        return method.resolve(Given(self.shared, self.per_model, self.base is not None))


def bind(
    method: Method, ids: Iterable[Hashable], base: Hashable | None, parameters: Mapping[str, Any]
) -> Bound:
    """The inputs of a method among these ids. ValueError and TypeError for too few models or too
    many, and for parameters that are not the method's or not in their range.
    """
    if method.statistics:
        raise ValueError(f"{method.name} merges by statistics; pymerge.merge takes them")
    if method.needs_base and base is None:
        raise ValueError(f"{method.name} needs a base among the models")
    takes_base = method.takes_base and base is not None
    keys = [key for key in ids if not takes_base or key != base]
    if method.base_first:
        keys.sort(key=lambda key: key != base)
    wrong = method.wrong_count(len(keys))
    if wrong:
        raise ValueError(f"{method.name} {wrong}{' beside the base' if takes_base else ''}")
    unknown = [name for name in parameters if method.parameter(name) is None]
    if unknown:
        known = [p.name for p in method.parameters]
        raise TypeError(
            f"{method.name} has no parameter {shown(unknown[0])}; it has {', '.join(known)}"
            + nearest(unknown[0], known)
        )
    shared = {
        p.name: _value(method, p, parameters) for p in method.parameters if p.scope == "shared"
    }
    columns = {
        p.name: one_per_model(p, _value(method, p, parameters), keys)
        for p in method.parameters
        if p.scope != "shared" and keys
    }
    per_model = [{name: values[k] for name, values in columns.items()} for k in range(len(keys))]
    return Bound(keys, base if takes_base else None, shared, per_model)


def run_bound(
    method: Method,
    bound: Bound,
    states: Mapping[Hashable, StateDict],
    labels: Mapping[Hashable, str],
    out: dict[str, torch.Tensor],
    stacklevel: int | None = None,
) -> None:
    """Merge into `out` what is bound. labels: names of the models in messages. stacklevel: where
    warnings say that numbers are mergekit's and not the papers'; None leaves them out.
    """
    models = [states[key] for key in bound.keys]
    base = None if bound.base is None else states[bound.base]
    named = [labels[key] for key in bound.keys]
    with renamed(models=named, base="base" if bound.base is None else labels[bound.base]):
        if method.op == "ties":
            options = method.options(bound.shared, bound.per_model)
            seed = draw_seed() if options["trim"] in ("random", "magprune") else 0
            ties(models, base, seed=seed, out=out, **options)
            return
        check_state_dicts(models, base)
        calls: list[TensorCall] = [
            (name, [each[name] for each in models], None if base is None else base[name], target)
            for name, target in out.items()
        ]
        above = None if stacklevel is None else stacklevel + 1
        merge_each(calls, bound.resolve(method), "auto", above)


def _value(method: Method, parameter: Parameter, parameters: Mapping[str, Any]) -> Any:
    value = parameters.get(parameter.name, parameter.default)
    if value is REQUIRED:
        raise TypeError(f"{method.name} needs parameter {parameter.name!r}")
    return value if parameter.scope != "shared" else converted(parameter, value)
