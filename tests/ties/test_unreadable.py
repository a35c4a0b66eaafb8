"""E5: tensors whose values are not in their own memory are refused everywhere, by name; those that
only look strange are merged.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import pymerge
from pymerge.compat import mergekit, peft, ties_merging
from pymerge.engine.state_dict_statistics import merge_with_statistics
from pymerge.errors import CheckpointError
from pymerge.statistics import collect

distributed = pytest.importorskip("torch.distributed")
BACKENDS = ("auto", "reference", "cpu", "cuda", "triton")
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


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("torch has no gloo")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


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
    "masked": (lambda x: torch.masked.masked_tensor(x, x > 0), r"MaskedTensor.*\.to_tensor\("),
}


def good() -> Tensor:
    return torch.arange(16.0).view(4, 4) + 1


@pytest.fixture(params=KINDS)
def strange(request: pytest.FixtureRequest) -> SimpleNamespace:
    make, way_out = KINDS[request.param]
    if make is spread or "DTensor" in request.param:
        request.getfixturevalue("process_group")
    return SimpleNamespace(tensor=make(good()), way_out=way_out, name=request.param)


def reader(gram: Tensor) -> SimpleNamespace:
    return SimpleNamespace(
        input_gram=lambda layer: gram,
        output_grad_gram=lambda layer: None,
        block_fisher=lambda parameter: None,
        diagonal_fisher=lambda parameter: gram,
    )


def by_statistics(method: str, gram: Tensor | None = None, init: object = "average", **state):
    models = [{"w": good(), **state}] * 2
    gram = torch.eye(4) if gram is None else gram
    return merge_with_statistics(models, models[0], [reader(gram)] * 2, method, init=init)


# What is called, with the strange tensor as x, and how the error names it.
CALLS: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "mats": (lambda x: pymerge.mats([good(), x], [torch.eye(4)] * 2), r"weights\[1\]"),
    "mats base": (
        lambda x: pymerge.mats([good()], [torch.eye(4)], base=x, init="pretrained"),
        "base",
    ),
    "mats init": (lambda x: pymerge.mats([good()], [torch.eye(4)], init=x), "init"),
    "input gram": (lambda x: pymerge.mats([good()] * 2, [torch.eye(4), x]), r"input_grams\[1\]"),
    "output gram": (
        lambda x: pymerge.mats([good()], [torch.eye(4)], [x]),
        r"output_grams\[0\]",
    ),
    "stacked grams": (lambda x: pymerge.mats([good()] * 4, x), "input_grams"),
    "stacked weights": (lambda x: pymerge.mats(x, [torch.eye(4)] * 4), "weights"),
    "averaged stack": (lambda x: pymerge.weighted_average(x, [good()] * 4), "weights"),
    "mergekit stack": (lambda x: mergekit.merge_tensors(x, "linear"), "tensors"),
    "mats_many": (
        lambda x: pymerge.mats_many([pymerge.MatsLayer([x], [torch.eye(4)])]),
        r"weights\[0\]",
    ),
    "regmean": (lambda x: pymerge.regmean([x], [torch.eye(4)]), r"weights\[0\]"),
    "regmean gram": (lambda x: pymerge.regmean([good()], [x]), r"input_grams\[0\]"),
    "average": (lambda x: pymerge.weighted_average([x], [good()]), r"weights\[0\]"),
    "fisher": (lambda x: pymerge.weighted_average([good()], [x]), r"fishers\[0\]"),
    "stacked fishers": (lambda x: pymerge.weighted_average([good()] * 4, x), "fishers"),
    "average init": (lambda x: pymerge.weighted_average([good()], [good() * 0], init=x), "init"),
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
    "disjoint": (lambda x: peft.disjoint_merge(x, good() > 0), "task_tensors"),
    "mask": (lambda x: peft.disjoint_merge(good(), x), "majority_sign_mask"),
    "arithmetic": (lambda x: peft.task_arithmetic([good(), x], [1, 1]), r"task_tensors\[1\]"),
    "peft prune": (lambda x: peft.magnitude_prune([x], [1], 0.5), r"task_tensors\[0\]"),
    "peft ties": (lambda x: peft.ties([x], [1], 0.5), r"task_tensors\[0\]"),
    "dare": (lambda x: peft.dare_linear([x], [1], 0.5), r"task_tensors\[0\]"),
    "dare ties": (lambda x: peft.dare_ties([x], [1], 0.5), r"task_tensors\[0\]"),
    "official": (lambda x: ties_merging.ties_merging(x, 20, "dis-mean"), "flat_task_checks"),
    "top k": (lambda x: ties_merging.topk_values_mask(x), "M"),
    "flat": (lambda x: ties_merging.state_dict_to_vector({"w": x}), r"state_dict\['w'\]"),
    "unflat": (lambda x: ties_merging.vector_to_state_dict(x, {"w": good()}), "vector"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "strange",
    ["DTensor", "wrapper", "FakeTensor", "meta", "view of an empty storage"],
    indirect=True,
)
def test_every_function_refuses_them_by_name(call, strange):
    function, name = CALLS[call]
    with pytest.raises(TypeError, match=rf"{name} .*{strange.way_out}"):
        function(strange.tensor)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_and_select_refuse_them_before_a_backend_is_asked(backend, strange):
    x, ok = strange.tensor, good()

    def refused(name: str, function, *args, **options):
        with pytest.raises(TypeError, match=rf"{name} .*{strange.way_out}"):
            function(*args, backend=backend, **options)

    for call in (pymerge.ties, pymerge.select):
        refused(r"models\[1\]", call, [ok, x], ok)
        refused("base", call, [ok, ok], x)
        refused(r"models\[0\]\['w'\]", call, [{"w": x}], {"w": ok})
        refused(r"base\['w'\]", call, [{"w": ok}], {"w": x})
        refused("models", call, x)
    refused("out", pymerge.ties, [ok], ok, out=x)
    if strange.name not in ("nested", "jagged", "lazy"):  # whose shape is another
        refused(r"out\['w'\]", pymerge.ties, [{"w": ok}], {"w": ok}, out={"w": x})


@pytest.mark.parametrize("kind", ["DTensor", "wrapper", "FakeTensor", "meta", "empty storage"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_tensors_that_are_only_copied_too(request, kind, dtype):
    if kind == "DTensor":
        request.getfixturevalue("process_group")
    make, way_out = KINDS[kind]
    plain, x = good().to(dtype), make(good().to(dtype))
    ours, theirs = {"w": good(), "n": x}, {"w": good(), "n": plain}
    calls = [
        lambda: pymerge.ties([ours], theirs),
        lambda: pymerge.ties([theirs], ours),
        lambda: pymerge.ties([theirs], theirs, out={"w": torch.empty(4, 4), "n": x}),
        lambda: pymerge.select([ours]),
        lambda: pymerge.merge([ours], method="passthrough"),
        lambda: by_statistics("mats", n=x),
        lambda: mergekit.merge_state_dicts([theirs, ours], "linear"),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=rf"\['n'\] .*{way_out}"):
            call()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    "make",
    [
        torch.nn.Parameter,
        torch.nn.Buffer,
        lambda x: x.clone().requires_grad_(),
        lambda x: x.clone().requires_grad_() * 1,
        lambda x: x.as_subclass(Named),
        lambda x: torch.nn.Parameter(x.as_subclass(Named)),
        lambda x: x.t().contiguous().t(),
        lambda x: torch.stack([x, x], -1)[..., 1],
        lambda x: torch.cat([x, x])[4:],
        lambda x: torch.frombuffer(bytearray(x.numpy().tobytes()), dtype=x.dtype).view(4, 4),
        lambda x: torch.from_numpy(x.numpy()),
        lambda x: x.clone().share_memory_(),
    ],
)
def test_what_only_looks_strange_is_merged(make, backend):
    a, b, base = torch.randn(4, 4), torch.randn(4, 4), torch.randn(4, 4)
    wanted = pymerge.ties([a, b], base, density=0.5)
    got = pymerge.ties([make(a), make(b)], make(base), density=0.5, backend=backend)
    assert torch.equal(got, wanted) and not got.requires_grad and type(got) is Tensor
    into = make(torch.zeros(4, 4))
    if into.is_contiguous():
        pymerge.ties([a, b], base, density=0.5, backend=backend, out=into)
        assert torch.equal(into.detach(), wanted)
    states = pymerge.ties([{"w": make(a)}, {"w": make(b)}], {"w": make(base)}, density=0.5)
    assert torch.equal(states["w"], wanted)
    thresholds = pymerge.select([make(a)], make(base), backend=backend)
    assert torch.equal(thresholds, pymerge.select([a], base))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_inference_tensors_are_read_and_written(backend):
    with torch.inference_mode():
        a, out = torch.randn(5), torch.empty(5)
    pymerge.ties([a], density=1.0, backend=backend, out=out)
    assert torch.equal(out, a)
    assert not pymerge.ties([a], backend=backend).is_inference()


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_empty_tensors_have_no_address_and_need_none(shape):
    x = torch.empty(shape)
    assert pymerge.ties([x, x], x).shape == shape
    assert pymerge.merge([{"w": x, "v": x}], method="linear")["w"].shape == shape
    with pytest.raises(TypeError, match="meta device"):
        pymerge.ties([x.to("meta")])


def test_expanded_tensors_reach_no_further_than_their_storage():
    x = torch.ones(1).expand(1000)
    assert torch.equal(pymerge.ties([x, x], density=1.0), x)


def test_a_mode_that_makes_other_tensors_is_noticed():
    x = torch.ones(3)
    with FakeTensorMode(), pytest.raises(TypeError, match="the result is a FakeTensor"):
        pymerge.ties([x])
    with FakeTensorMode(), pytest.raises(TypeError, match="the result is a FakeTensor"):
        pymerge.ties([{"w": x}])
    with torch.device("meta"):
        assert torch.equal(pymerge.ties([x], density=1.0), x)
        assert pymerge.select([x]).device.type == "cpu"


@pytest.mark.parametrize(
    ("option", "call"),
    [
        ("weights", lambda v: pymerge.ties([good()], weights=v)),
        ("density", lambda v: pymerge.select([good()], density=v)),
        ("scaling", lambda v: pymerge.ties([good()], scaling=v)),
        ("weights", lambda v: pymerge.merge([{"w": good()}], method="linear", weights=v)),
        ("task_weights", lambda v: pymerge.regmean([good()], [torch.eye(4)], task_weights=v)),
        ("weight", lambda v: mergekit.merge_tensors([good()], "linear", parameters={"weight": v})),
    ],
)
def test_options_that_have_no_values(option, call):
    for make in (lambda x: x.to("meta"), FakeTensorMode().from_tensor):
        with pytest.raises(TypeError, match=rf"{option}.*pass"):
            call(make(torch.ones(1)))


def test_complex_tensors_of_state_dicts_are_the_bases():
    phases = torch.polar(torch.ones(3), torch.arange(3.0))
    model, base = {"w": good(), "p": phases.conj()}, {"w": good(), "p": phases}
    with pytest.warns(UserWarning, match="'p' is torch.complex64 and differs in models"):
        merged = pymerge.ties([model], base)
    assert torch.equal(merged["p"], phases) and merged["p"] is not phases
    assert torch.equal(pymerge.ties([model])["p"], phases.conj())


def test_quantised_tensors_say_the_way_out():
    x = torch.quantize_per_tensor(good(), 0.1, 0, torch.qint8)
    for call in (lambda: pymerge.ties([x]), lambda: pymerge.ties([{"w": x}])):
        with pytest.raises(TypeError, match=r"qint8.*\.dequantize\(\)"):
            call()


def test_statistics_are_of_models_and_batches_that_have_values(process_group):
    def model() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(4, 2))

    for make in (spread, FakeTensorMode().from_tensor, lambda x: x.to("meta")):
        strange, batches = model(), [torch.randn(3, 4)]
        strange[0].weight = torch.nn.Parameter(make(strange[0].weight.detach()))
        with pytest.raises(TypeError, match=r"model: '0\.weight' is "):
            collect(strange, batches, kinds=("input_gram",))
        with pytest.raises(TypeError, match="batches: a tensor is "):
            collect(model(), [make(batches[0])], kinds=("input_gram",))


def folder(tmp_path: Path, tensors: dict[str, Tensor]) -> dict[str, object]:
    where = tmp_path / "m"
    where.mkdir()
    (where / "config.json").write_text(json.dumps({}), encoding="utf-8")
    torch.save(tensors, where / "pytorch_model.bin")
    return {"merge_method": "passthrough", "models": [{"model": str(where)}]}


@pytest.mark.parametrize("kind", ["meta", "sparse", "DTensor"])
def test_pickled_files_name_what_they_do_not_hold(tmp_path, request, kind):
    request.getfixturevalue("process_group")  # what loads a DTensor is imported
    make, way_out = KINDS[kind]
    config = folder(tmp_path, {"a.weight": make(good()), "b.weight": good()})
    with pytest.raises(
        CheckpointError, match=rf"pytorch_model\.bin: tensor 'a\.weight' .*{way_out}"
    ):
        pymerge.merge_checkpoints(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pickled_views_are_what_they_stand_for(tmp_path):
    from safetensors.torch import load_file

    x = good()
    config = folder(tmp_path, {"a.weight": torch._neg_view(x), "b.weight": x.t()})
    pymerge.merge_checkpoints(config, tmp_path / "out")
    merged = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(merged["a.weight"], -x) and torch.equal(merged["b.weight"], x.t())


def test_torch_distributed_tensors_are_not_imported_for_it():
    code = (
        "import sys, torch, pymerge; before = set(sys.modules); x = torch.ones(3);"
        " pymerge.ties([x]); pymerge.select([x]); print([m for m in set(sys.modules) - before if"
        " m.startswith(('torch.distributed', 'torch._subclasses'))])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "empty", [torch.zeros(10, 4)[10:, 4:], torch.zeros(0, 4)[:, 4:], torch.zeros(4)[4:]]
)
def test_an_empty_view_may_begin_anywhere(empty: torch.Tensor) -> None:
    assert pymerge.ties([empty, empty], empty).shape == empty.shape


@pytest.mark.parametrize("option", ["weights", "density"])
def test_options_in_a_tensor_that_is_cut(option: str) -> None:
    numbers = torch.tensor([0.5, 0.7])
    numbers.untyped_storage().resize_(4)
    x = torch.ones(4)
    with pytest.raises(TypeError, match=f"{option} is a Tensor whose memory was freed or cut"):
        pymerge.ties([x, x], x, **{option: numbers})


def test_select_refuses_quantised_tensors() -> None:
    x = torch.ones(4)
    q = torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)
    for models, base in (([{"a": x}], {"a": q}), ([{"a": q}], {"a": x})):
        for scope in ("tensor", "model"):
            with pytest.raises(TypeError, match="dequantize"):
                pymerge.select(models, base, scope=scope)
