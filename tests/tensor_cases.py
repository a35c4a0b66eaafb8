"""What is called with tensors, and tensors whose values are not in their own memory (E5)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import pymerge
from pymerge.compat import mergekit, peft, ties_merging
from pymerge.engine.state_dict_statistics import merge_with_statistics
from pymerge.statistics import Prediction, collect

Tensor = torch.Tensor


class Wrapped(torch.Tensor):
    """A tensor around another one, as quantised weights are: it has no memory."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        plain = [x.inner if isinstance(x, Wrapped) else x for x in args]
        return function(*plain, **(kwargs or {}))


class Opposite(torch.Tensor):
    """Stands for the opposite of what its memory holds, of which `data_ptr()` knows nothing."""

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        plain = [-x.as_subclass(Tensor) if isinstance(x, Opposite) else x for x in args]
        return function(*plain, **(kwargs or {}))


class Named(torch.Tensor):
    """An innocent subclass: Python sees what is called, the memory is its own."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return super().__torch_function__(function, types, args, kwargs or {})


def spread(x: Tensor) -> Tensor:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    return distribute_tensor(x, init_device_mesh("cpu", (1,)), [Shard(0)])


def resized(x: Tensor, bytes_left: int, first: int = 0) -> Tensor:
    """A view of x's values in a storage that is then cut."""
    long = torch.cat([torch.zeros(first, dtype=x.dtype), x.reshape(-1)])
    return cut(long[first:].view(x.shape), bytes_left)


def cut(view: Tensor, bytes_left: int) -> Tensor:
    view.untyped_storage().resize_(bytes_left)
    return view


def inside(transform: Callable[[Callable], Callable], x: Tensor) -> Tensor:
    """What a function sees of x inside of a transform of torch.func."""
    seen = []
    transform(lambda t: (seen.append(t), t.sum())[1])(x)
    return seen[0]


KINDS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "DTensor": (spread, r"DTensor.*\.full_tensor\(\)"),
    "parameter of a DTensor": (lambda x: torch.nn.Parameter(spread(x)), r"\.full_tensor\(\)"),
    "wrapper": (Wrapped, r"Wrapped.*\.dequantize\(\)"),
    "other values": (lambda x: x.as_subclass(Opposite), "Opposite.*plain torch.Tensor"),
    "FakeTensor": (lambda x: FakeTensorMode().from_tensor(x), "FakeTensor.*real tensors"),
    "meta": (lambda x: x.to("meta"), "meta device.*load the model first"),
    "empty storage": (lambda x: resized(x, 0), "storage of 0.*gather the parameters"),
    "view of an empty storage": (lambda x: resized(x, 0, 2), "storage of 0"),
    "cut storage": (lambda x: resized(x, 68, 2), "byte 72 of a storage of 68"),
    "strides beyond": (lambda x: cut(torch.cat([x, x], 1)[:, ::2], 120), "124 of a storage of 120"),
    "vmap": (lambda x: inside(torch.vmap, x.expand(2, *x.shape)), "torch.func.*vmap"),
    "grad": (lambda x: inside(torch.func.grad, x), "torch.func.*grad"),
    "functional": (lambda x: inside(torch.func.functionalize, x), "no address.*torch.func"),
    "zero": (lambda x: torch._efficientzerotensor(x.shape), "no address"),
    "negated": (torch._neg_view, r"\.resolve_neg\(\)"),
    "sparse": (lambda x: x.to_sparse(), r"sparse_coo.*\.to_dense\(\)"),
    "sparse rows": (lambda x: x.to_sparse_csr(), r"sparse_csr.*\.to_dense\(\)"),
    "nested": (lambda x: torch.nested.nested_tensor(list(x)), r"nested.*\.unbind\(\)"),
    "jagged": (
        lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
        r"NestedTensor.*\.unbind\(\)",
    ),
    "lazy": (lambda x: torch.nn.UninitializedParameter(), "uninitialized parameter; run the model"),
    "quantised": (
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        r"qint8.*\.dequantize\(\)",
    ),
    "masked": (lambda x: torch.masked.masked_tensor(x, x > 0), r"MaskedTensor.*\.to_tensor\("),
}


# Made once: what a test makes under a mode of torch may be another kind of tensor.
_GOOD, _EYE, _MASK = (
    torch.arange(16.0).view(4, 4) + 1,
    torch.eye(4),
    torch.arange(16).view(4, 4) > 7,
)
_NOTHING = torch.zeros(4, 4)


def good() -> Tensor:
    return _GOOD


def eye() -> Tensor:
    return _EYE


def reader(gram: Tensor) -> SimpleNamespace:
    return SimpleNamespace(
        input_gram=lambda layer: gram,
        output_grad_gram=lambda layer: None,
        block_fisher=lambda parameter: None,
        diagonal_fisher=lambda parameter: gram,
    )


def by_statistics(method: str, gram: Tensor | None = None, init: object = "average", **state):
    models = [{"w": good(), **state}] * 2
    gram = eye() if gram is None else gram
    return merge_with_statistics(models, models[0], [reader(gram)] * 2, method, init=init)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def forward(self, input: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.layer(input)


_MODEL = Model()


def statistics(batch: object, **options) -> Tensor:
    if "loss" not in options:
        return collect(_MODEL, [batch], kinds=("input_gram",), **options).input_gram("layer")
    found = collect(_MODEL, [batch], kinds=("diagonal_fisher",), **options)
    return found.diagonal_fisher("layer.weight")


# What is called, with the strange tensor as x, and how the error names it.
CALLS: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "mats": (lambda x: pymerge.mats([good(), x], [eye()] * 2), r"weights\[1\]"),
    "mats base": (
        lambda x: pymerge.mats([good()], [eye()], base=x, init="pretrained"),
        "base",
    ),
    "mats init": (lambda x: pymerge.mats([good()], [eye()], init=x), "init"),
    "input gram": (lambda x: pymerge.mats([good()] * 2, [eye(), x]), r"input_grams\[1\]"),
    "output gram": (
        lambda x: pymerge.mats([good()], [eye()], [x]),
        r"output_grams\[0\]",
    ),
    "stacked grams": (lambda x: pymerge.mats([good()] * 4, x), "input_grams"),
    "stacked weights": (lambda x: pymerge.mats(x, [eye()] * 4), "weights"),
    "averaged stack": (lambda x: pymerge.weighted_average(x, [good()] * 4), "weights"),
    "mergekit stack": (lambda x: mergekit.merge_tensors(x, "linear"), "tensors"),
    "mats_many": (
        lambda x: pymerge.mats_many([pymerge.MatsLayer([x], [eye()])]),
        r"weights\[0\]",
    ),
    "regmean": (lambda x: pymerge.regmean([x], [eye()]), r"weights\[0\]"),
    "regmean gram": (lambda x: pymerge.regmean([good()], [x]), r"input_grams\[0\]"),
    "average": (lambda x: pymerge.weighted_average([x], [good()]), r"weights\[0\]"),
    "fisher": (lambda x: pymerge.weighted_average([good()], [x]), r"fishers\[0\]"),
    "stacked fishers": (lambda x: pymerge.weighted_average([good()] * 4, x), "fishers"),
    "average init": (lambda x: pymerge.weighted_average([good()], [_NOTHING], init=x), "init"),
    "with statistics": (lambda x: by_statistics("mats", w=x), r"models\[0\]\['w'\]"),
    "statistics": (lambda x: by_statistics("mats", x), r"input_gram of 'w' in statistics\[0\]"),
    "fishers": (lambda x: by_statistics("fisher", x), r"diagonal_fisher of 'w' in statistics\[0\]"),
    "initial model": (lambda x: by_statistics("mats", init={"w": x}), r"init\['w'\]"),
    "linear": (lambda x: pymerge.merge([{"w": x}], method="linear"), r"models\[0\]\['w'\]"),
    "passthrough": (lambda x: pymerge.merge([{"w": x}], method="passthrough"), r"\['w'\]"),
    "merge base": (lambda x: pymerge.merge([{"w": good()}], {"w": x}), r"base\['w'\]"),
    "mergekit": (
        lambda x: mergekit.merge_state_dicts({"a": {"w": good()}, "b": {"w": x}}, "linear"),
        r"models\['b'\]\['w'\]",
    ),
    "mergekit tensors": (
        lambda x: mergekit.merge_tensors([good(), x], "linear", parameters={"weight": 1}),
        r"tensors\[1\]",
    ),
    "sparsify": (lambda x: mergekit.sparsify(x, 0.5, "magnitude"), "tensor"),
    "prune all": (lambda x: peft.prune(x, 1.0, "magnitude"), "tensor"),
    "prune": (lambda x: peft.prune(x, 0.5, "random"), "tensor"),
    "magnitude": (lambda x: peft.magnitude_based_pruning(x, 0.5), "tensor"),
    "random": (lambda x: peft.random_pruning(x, 0.5, True), "tensor"),
    "signs": (lambda x: peft.calculate_majority_sign_mask(x), "tensor"),
    "disjoint": (lambda x: peft.disjoint_merge(x, _MASK), "task_tensors"),
    "mask": (lambda x: peft.disjoint_merge(good(), x), "majority_sign_mask"),
    "arithmetic": (lambda x: peft.task_arithmetic([good(), x], [1, 1]), r"task_tensors\[1\]"),
    "peft prune": (lambda x: peft.magnitude_prune([x], [1], 0.5), r"task_tensors\[0\]"),
    "peft ties": (lambda x: peft.ties([x], [1], 0.5), r"task_tensors\[0\]"),
    "dare": (lambda x: peft.dare_linear([x], [1], 0.5), r"task_tensors\[0\]"),
    "dare ties": (lambda x: peft.dare_ties([x], [1], 0.5), r"task_tensors\[0\]"),
    "official": (lambda x: ties_merging.ties_merging(x, 20, "dis-mean"), "flat_task_checks"),
    "official modes": (
        lambda x: ties_merging.merge_methods("std", x, 1, "normfrac", "median"),
        "flat_task_checks",
    ),
    "oracle": (
        lambda x: ties_merging.merge_with_oracle_sign(x, good(), 20, "dis-max"),
        "final_signs",
    ),
    "official signs": (lambda x: ties_merging.resolve_sign(x, "normmass"), "Tensor"),
    "agreement": (lambda x: ties_merging.sign_agreement_ratio(x), "M"),
    "aggregate": (lambda x: ties_merging.aggregate(x, "median", None), "T"),
    "std mask": (lambda x: ties_merging.greater_than_std_mask(x, 1), "tensor"),
    "add": (lambda x: ties_merging.add_ptm_to_tv({"w": x}, {"w": good()}), r"tv_dict\['w'\]"),
    "top k": (lambda x: ties_merging.topk_values_mask(x), "M"),
    "flat": (lambda x: ties_merging.state_dict_to_vector({"w": x}), r"state_dict\['w'\]"),
    "unflat": (lambda x: ties_merging.vector_to_state_dict(x, {"w": good()}), "vector"),
    "fishers of two": (
        lambda x: pymerge.weighted_average([good()] * 2, [good(), x]),
        r"fishers\[1\]",
    ),
    "an init that is not needed": (
        lambda x: pymerge.weighted_average([good()] * 2, [good()] * 2, init=x),
        "init",
    ),
    "a base that is not needed": (
        lambda x: pymerge.weighted_average([good()] * 2, [good()] * 2, base=x),
        "base",
    ),
    "ties": (lambda x: pymerge.ties([good(), x], density=0.5), r"models\[1\]"),
    "ties base": (lambda x: pymerge.ties([good()], x, density=0.5), "base"),
    "ties by name": (
        lambda x: pymerge.ties([{"w": x}, {"w": good()}], scope="model"),
        r"models\[0\]\['w'\]",
    ),
    "ties reference": (lambda x: pymerge.ties([x], backend="reference"), r"models\[0\]"),
    "ties random": (lambda x: pymerge.ties([x], trim="random"), r"models\[0\]"),
    "ties out": (lambda x: pymerge.ties([eye()], out=x), "out"),
    "select": (lambda x: pymerge.select([good(), x]), r"models\[1\]"),
    "select by name": (lambda x: pymerge.select([{"w": x}], scope="model"), r"\['w'\]"),
    "select reference": (lambda x: pymerge.select([x], backend="reference"), r"models\[0\]"),
    "merge by statistics": (
        lambda x: pymerge.merge([{"w": x}], method="fisher", statistics=[reader(good())]),
        r"models\[0\]\['w'\]",
    ),
    "one without statistics": (
        lambda x: merge_with_statistics(
            [{"w": good()}] * 2, None, [reader(good()), reader(None)], "fisher", init={"w": x}
        ),
        r"init\['w'\]",
    ),
    "signs by count": (lambda x: peft.calculate_majority_sign_mask(x, "frequency"), "tensor"),
    "flat of two": (
        lambda x: ties_merging.state_dict_to_vector({"v": good(), "w": x}),
        r"state_dict\['w'\]",
    ),
    "mergekit base": (
        lambda x: mergekit.merge_state_dicts(
            {"a": {"w": x}, "b": {"w": good()}},
            "task_arithmetic",
            base="a",
            parameters={"weight": 1},
        ),
        r"models\['a'\]\['w'\]",
    ),
    "a mask of a batch": (
        lambda x: statistics({"input": good(), "attention_mask": x}),
        r"attention_mask'?",
    ),
    "what mask= returned": (lambda x: statistics(good(), mask=lambda b, n: x), "mask= returned"),
    "losses": (
        lambda x: statistics(good(), loss=lambda m, b: x, labels="empirical"),
        "what loss returned",
    ),
    "logits": (lambda x: statistics(good(), loss=lambda m, b: Prediction(x)), "logits"),
    "a mask of predictions": (
        lambda x: statistics(
            good(), loss=lambda m, b: Prediction(m(b)[..., None].expand(-1, -1, 3), None, x)
        ),
        "mask",
    ),
}

# Those whose tensors are batches, of which a model says what it takes.
BATCHES: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "a batch": (lambda x: statistics(x), "batches: a tensor"),
    "a named batch": (lambda x: statistics({"input": x}), "batches: 'input'"),
    "batches in a tuple": (lambda x: statistics((x,)), "batches: a tensor"),
    "numbers of examples": (
        lambda x: statistics({"input": good(), "example_numbers": x}),
        "batches: 'example_numbers'",
    ),
}


def _of_method(
    name: str, models: int, options: dict[str, float]
) -> Iterator[tuple[str, tuple[Callable[[Tensor], object], str]]]:
    """The function of a method, on tensors and on state dicts, with the strange one as a model, as
    the base and as out.
    """
    method = partial(getattr(pymerge, name), **options)
    others = [good()] * (models - 1)
    base = [] if name == "karcher" else [good()]
    states, start = [{"w": each} for each in others], [{"w": each} for each in base]
    yield name, (lambda x: method([x, *others], *base), r"models\[0\]")
    yield (
        f"{name} by name",
        (lambda x: method([{"w": x}, *states], *start), r"models\[0\]\['w'\]"),
    )
    yield f"{name} out", (lambda x: method([eye(), *others], *base, out=x), "out")
    if base:
        yield f"{name} base", (lambda x: method([good(), *others], x), "base")
        yield (
            f"{name} base by name",
            (lambda x: method([{"w": good()}, *states], {"w": x}), r"base\['w'\]"),
        )


_METHODS = {
    "slerp": (1, {"t": 0.5}),
    "nuslerp": (2, {}),
    "multislerp": (2, {}),
    "karcher": (2, {}),
    "model_stock": (2, {}),
    "nearswap": (1, {"t": 0.5}),
    "ram": (2, {}),
    "ramplus_tl": (2, {}),
    "sce": (2, {}),
    "wudi": (2, {}),
    "tsv": (2, {}),
    "iso_c": (2, {}),
    "arcee_fusion": (1, {}),
}
# Functions of single methods, and what the official code's drop-in has beside its entry points.
METHODS: dict[str, tuple[Callable[[Tensor], object], str]] = {
    **{key: call for name, given in _METHODS.items() for key, call in _of_method(name, *given)},
    "gram": (lambda x: pymerge.gram([good(), x]), r"models\[1\]"),
    "gram base": (lambda x: pymerge.gram([good()], x, per="row"), "base"),
    "gram stack": (lambda x: pymerge.gram(x), "models"),
    "combine": (lambda x: pymerge.combine([good(), x], [1, 1]), r"models\[1\]"),
    "combine base": (lambda x: pymerge.combine([good()], [1], x), "base"),
    "combine out": (lambda x: pymerge.combine([eye()], [1], out=x), "out"),
    "combine by": (lambda x: pymerge.combine([good()] * 4, x, per="row"), "coefficients"),
    "ties magprune": (lambda x: pymerge.ties([x], trim="magprune"), r"models\[0\]"),
    "lower magnitudes": (lambda x: ties_merging.bottomk_values_mask(x), "M"),
    "near the mean": (lambda x: ties_merging.less_than_std_mask(x, 1), "tensor"),
    "norm fraction": (lambda x: ties_merging.topk_mask_preserve_normfrac(x), "T"),
    "equal state dicts": (
        lambda x: ties_merging.check_state_dicts_equal({"w": good()}, {"w": x}),
        r"state_dict2\['w'\]",
    ),
    "basic": (
        lambda x: ties_merging.basic_merging("mean", x, [{"w": good()}], []),
        "flat_checks",
    ),
    "sum of vectors": (lambda x: ties_merging.tv_merging(x), "tv_flat_checks"),
    "signs that are none": (lambda x: ties_merging.resolve_zero_signs(x), "sign_to_mult"),
    "signs of fractions": (lambda x: ties_merging.normfrac_based_sign(x), "Tensor"),
    "signs of squares": (lambda x: ties_merging.normmass_based_sign(x), "Tensor"),
    "aggregate signs": (
        lambda x: ties_merging.aggregate(good(), "mean", x),
        "final_signs",
    ),
    "merge signs": (
        lambda x: ties_merging.disjoint_merge(good(), "dis-mean", x),
        "sign_to_mult",
    ),
    "pretrained vector": (
        lambda x: ties_merging.add_ptm_to_tv({"w": good()}, {"w": x}),
        r"ptm_dict\['w'\]",
    ),
    "sparsify magprune": (
        lambda x: mergekit.sparsify(x, 0.5, "della_magprune", epsilon=0.1),
        "tensor",
    ),
    "mergekit slerp": (
        lambda x: mergekit.merge_state_dicts(
            {"a": {"w": good()}, "b": {"w": x}}, "slerp", base="a", parameters={"t": 0.5}
        ),
        r"models\['b'\]\['w'\]",
    ),
}

# Those that merge DTensors, if all their tensors are.
SHARDED = ("linear", "passthrough", "ties reference", "ties random", "ties magprune")

# Those that copy what they do not compute with.
COPIES = ("passthrough", "prune all", "unflat")
COPIES_COMPLEX = (*COPIES, "linear", "merge base", "with statistics", "ties by name")
COPIES_COMPLEX += (
    "mergekit stack",
    "select by name",
    "merge by statistics",
    "mergekit",
    "mergekit base",
)
