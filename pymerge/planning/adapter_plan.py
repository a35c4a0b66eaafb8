"""From the plan of a merged model to that of one adapter with the same update of its base
(docs/spec/low_rank.md, L7 to L9). Reads headers only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pymerge.checkpoint.adapter import AdaptedModel, OpenAdapter, Update
from pymerge.checkpoint.reader import OpenModel
from pymerge.checkpoint.stored import StoredTensor
from pymerge.dtypes import elements
from pymerge.messages.arguments import argument
from pymerge.messages.words import counted, names_with_verb, some_names
from pymerge.planning.adapters import Application, Target, apply_to
from pymerge.planning.plan import Factor, Plan, PlannedTensor, Term
from pymerge.recipe.model import MergeRecipe
from pymerge.rules.ties import TiesOptions

PREFIX = "base_model.model."
EXACT = "exact"
Rank = int | str
_ONE = 1e-6  # how far from 1 the weights of an average may sum up


@dataclass
class _Model:
    """What a model adds to the base: nothing, if it is the base."""

    adapter: OpenAdapter | None = None
    targets: Mapping[str, Target] = field(default_factory=dict)
    replaced: Mapping[str, str] = field(default_factory=dict)


def adapter_plan(
    plan: Plan,
    recipe: MergeRecipe,
    models: Sequence[OpenModel],
    rank: Rank,
    same: Callable[[StoredTensor, StoredTensor], bool],
) -> Plan:
    """The plan of the adapter. Problems are in the result, not raised.

    rank: the most that a module's update has, or "exact" for whatever the sum has. same: whether
    two tensors hold the same, which is asked of embeddings that peft saves beside their updates.
    """
    if plan.problems:
        return plan
    return _Planner(plan, recipe, models, rank, same).plan()


class _Planner:
    def __init__(
        self,
        plan: Plan,
        recipe: MergeRecipe,
        models: Sequence[OpenModel],
        rank: Rank,
        same: Callable[[StoredTensor, StoredTensor], bool],
    ) -> None:
        self.same = same
        self.whole = plan
        self.recipe = recipe
        self.opened = models
        self.rank = rank
        self.problems: list[str] = []
        self.scaled: list[str] = []  # tensors of the base that an average would scale
        self.inexact: list[str] = []
        self.stored: list[str] = []
        self.models = self._models()

    def plan(self) -> Plan:
        tensors: list[PlannedTensor] = []
        for tensor in self.whole.tensors if not self.problems else ():
            tensors += self._tensors(tensor)
        self._report()
        if not tensors and not self.problems:
            self.problems.append("the recipe's adapters update nothing")
        names = [tensor.name for tensor in tensors]
        if len({*names}) < len(names):
            self.problems.append(
                f"{self._asked()}: two modules of the base would have one name in the adapter"
            )
        return replace(
            self.whole,
            tensors=() if self.problems else tuple(tensors),
            bytes_read=sum(self._bytes(tensor) for tensor in tensors),
            problems=tuple(dict.fromkeys(self.problems)),
            config={},
            largest_set=0,
        )

    def _asked(self) -> str:
        return argument("rank", self.rank)

    def _models(self) -> list[_Model]:
        found = []
        one = next((m.base for m in self.opened if isinstance(m, AdaptedModel)), None)
        for index, model in enumerate(self.opened):
            if self.recipe.tokenizer_only and index == self.recipe.tokenizer:
                found.append(_Model())
                continue
            base = model.base if isinstance(model, AdaptedModel) else model
            if one is None or not _is_same(base, one):
                known = "" if one is None else f" of {one.reference}"
                self.problems.append(
                    f"{self._asked()} writes an adapter, and {model.reference} is none{known}; give"
                    " adapters of one base alone, or leave it out to write a model"
                )
                return []
            if not isinstance(model, AdaptedModel):
                found.append(_Model())
                continue
            applied = apply_to(model.adapter, model.base.header)
            by_name = {target.tensor: target for target in applied.targets}
            replaced = {
                name: own
                for name, own in applied.replaced.items()
                if name not in by_name
                or not self.same(
                    model.adapter.replaced[own],
                    model.base.tensors[applied.outputs.get(name, name)],
                )
            }
            found.append(_Model(model.adapter, by_name, replaced))
            self._check(model, applied)
        if self.recipe.sliced:
            self.problems.append(
                f"{self._asked()} writes an adapter, which has the layers of its base; remove the"
                " slices"
            )
        return found

    def _check(self, model: AdaptedModel, applied: Application) -> None:
        """Updates that are not s B A alone."""
        updates = model.adapter.updates.values()
        what = [
            word
            for word, found in (
                ("DoRA's magnitudes", any(u.magnitude is not None for u in updates)),
                ("biases of its factors (lora_bias)", any(u.bias is not None for u in updates)),
                ("an update of an output layer that the base ties", bool(applied.outputs)),
                ("trained biases", any(n.endswith(".bias") for n in model.adapter.replaced)),
            )
            if found
        ]
        if what:
            self.problems.append(
                f"{self._asked()} writes an adapter, and {model.reference} has"
                f" {' and '.join(what)}, which the factors of a merge cannot hold; leave it out to"
                " write a model"
            )

    def _tensors(self, tensor: PlannedTensor) -> list[PlannedTensor]:
        """The factors of a tensor's update, the tensor itself where it is replaced, or nothing."""
        sources = tensor.sources
        merged = [*sources, *([] if tensor.base is None else [tensor.base])]
        own = [self.models[source.model] for source in merged]
        targets = [
            model.targets.get(source.tensor) for model, source in zip(own, merged, strict=True)
        ]
        replaced = any(s.tensor in m.replaced for m, s in zip(own, merged, strict=True))
        if tensor.solve is not None or any(source.rows is not None for source in merged):
            if any(targets) or replaced or tensor.solve is not None:
                self.problems.append(
                    f"{self._asked()} writes an adapter, which has the rows of its base, merged"
                    f" without statistics; {tensor.name} is not"
                )
            return []
        options = tensor.options
        if options is not None and not isinstance(options, TiesOptions):
            what = (
                "does not merge the differences from a base"
                if tensor.base is None
                else "is not merged from the adapters' factors"
            )
            self.problems.append(
                f"{self._asked()} writes an adapter, and {self.recipe.method} {what}; leave it out"
                " to write a model"
            )
            return []
        if options is not None and tensor.base is None and not _keeps_the_base(options):
            self.scaled.append(tensor.name)
            return []
        if replaced:
            if any(targets):
                self.stored.append(tensor.name)
            return [replace(tensor, name=PREFIX + tensor.name)]
        if not any(targets):
            return []
        if tensor.base is not None and targets[-1] is not None:
            self.problems.append(
                f"{self._asked()} writes an adapter of the base itself; name the base without an"
                " adapter as base_model"
            )
            return []
        return self._factors(tensor, options, targets[: len(sources)])

    def _factors(
        self,
        tensor: PlannedTensor,
        options: TiesOptions | None,
        targets: Sequence[Target | None],
    ) -> list[PlannedTensor]:
        linear = options is None or _is_linear(options)
        weights = [1.0] * len(targets) if options is None else _coefficients(options)
        first = next(target for target in targets if target is not None)
        terms: list[Term] = []
        for source, target, weight in zip(tensor.sources, targets, weights, strict=True):
            module = "" if target is None else target.update.module
            if target is not None or not linear:
                terms.append(Term(source.model, module, weight if linear else 1.0))
        whole = sum(target.update.rank for target in targets if target is not None)
        rows = tensor.shape[0]
        most = min(rows, elements(tensor.shape) // max(1, rows))
        if not linear and (self.rank == EXACT or options is None or options.scope == "model"):
            self.inexact.append(tensor.name)
            return []
        rank = whole if self.rank == EXACT else int(self.rank)
        if self.rank != EXACT:
            rank = min(rank, most, whole) if linear else min(rank, most)
        pairs = zip(tensor.sources, targets, strict=True)
        model = self.models[next(s.model for s, target in pairs if target is not None)]
        flat = model.adapter is not None and bool(model.adapter.groups)
        module = tensor.name.removesuffix(".weight") if flat else first.update.module
        factor = Factor(
            "A",
            module,
            tensor.name,
            tensor.shape,
            first.transposed or first.update.embeds,
            rank,
            linear and rank == whole,
            tuple(terms),
            None if linear else options,
        )
        return [
            replace(
                tensor,
                name=f"{PREFIX}{module}.lora_{'embedding_' * first.update.embeds}{which}{end}",
                shape=shape,
                dtype="float32",
                sources=(),
                base=None,
                options=None,
                factor=replace(factor, which=which),
            )
            for which, shape in _shapes(first.update, rank).items()
            for end in ["" if first.update.embeds else ".weight"]
        ]

    def _bytes(self, tensor: PlannedTensor) -> int:
        """Bytes that are read for it: a pair of factors counts once."""
        if tensor.factor is None:
            return sum(self.opened[s.model].tensors[s.tensor].nbytes for s in tensor.inputs)
        return factor_bytes(tensor.factor, self.opened) if tensor.factor.which == "A" else 0

    def _report(self) -> None:
        if self.scaled:
            self.problems.append(
                f"{self._asked()} writes an adapter, and weights that do not sum to 1 scale the"
                f" base too ({some_names(self.scaled)}); give weights that sum to 1, or normalize:"
                " true, or add the updates to the base with task_arithmetic"
            )
        if self.inexact:
            self.problems.append(
                f"{self._asked()}: an update merged by {self.whole.method} has no rank that is"
                f" known ({some_names(self.inexact)}); pass a number, as"
                f" {argument('rank', 32)}, with thresholds of single tensors, and the best"
                " approximation of that rank is written"
            )
        if self.stored:
            self.problems.append(
                f"{self._asked()}: {names_with_verb(self.stored)} updated and replaced by the"
                " adapters, which one adapter cannot do; leave it out to write a model"
            )


def _is_same(one: OpenModel, other: OpenModel) -> bool:
    return one is other or [f.path.resolve() for f in one.files] == [
        f.path.resolve() for f in other.files
    ]


def _is_linear(options: TiesOptions) -> bool:
    """Whether the merge is a weighted sum of the task vectors."""
    plain = options.trim == "none" and options.elect == "none" and options.rescale == "none"
    return plain and options.merge in ("sum", "weighted_mean")


def _coefficients(options: TiesOptions) -> list[float]:
    total = sum(options.weights) if options.merge == "weighted_mean" else 1.0
    return [options.scaling * weight / (total or 1.0) for weight in options.weights]


def _keeps_the_base(options: TiesOptions) -> bool:
    """Whether an average of models keeps what all of them have."""
    return _is_linear(options) and abs(sum(_coefficients(options)) - 1.0) <= _ONE


def _shapes(update: Update, rank: int) -> dict[str, tuple[int, ...]]:
    a, b = update.a.info.shape, update.b.info.shape
    return {"A": (rank, *a[1:]), "B": (b[0], rank, *b[2:])}


def factor_bytes(factor: Factor, models: Sequence[OpenModel]) -> int:
    """Bytes of the factors that a module's update is made of."""
    read = 0
    for term in factor.terms:
        model = models[term.model]
        if isinstance(model, AdaptedModel) and term.module:
            update = model.adapter.updates[term.module]
            read += update.a.nbytes + update.b.nbytes
    return read


def saved_modules(plan: Plan) -> list[str]:
    """The modules that the adapter replaces as a whole."""
    names = [t.name.removeprefix(PREFIX) for t in plan.tensors if t.factor is None]
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))


def ranks(plan: Plan) -> dict[str, int]:
    """The rank of every module that gets an update."""
    factors = [t.factor for t in plan.tensors if t.factor is not None]
    return {factor.module: factor.rank for factor in factors}


def summary_note(plan: Plan) -> str:
    found = ranks(plan)
    least, most = min(found.values(), default=0), max(found.values(), default=0)
    of = f"{least}" if least == most else f"{least} to {most}"
    return f"the result is an adapter of {counted(len(found), 'module')}, of rank {of}"
