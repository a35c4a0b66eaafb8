"""E5: tensors whose values are not in their own memory are refused everywhere, by name; those that
only look strange are merged.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensor_cases import (
    BATCHES,
    CALLS,
    KINDS,
    METHODS,
    SHARDED,
    Named,
    by_statistics,
    cut,
    good,
    spread,
)
from torch._subclasses.fake_tensor import FakeTensorMode

import pymerge
from pymerge.compat import mergekit
from pymerge.errors import CheckpointError
from pymerge.statistics import collect

distributed = pytest.importorskip("torch.distributed")
BACKENDS = ("auto", "reference", "cpu", "cuda", "triton")
Tensor = torch.Tensor


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("torch has no gloo")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.fixture(params=KINDS)
def strange(request: pytest.FixtureRequest) -> SimpleNamespace:
    make, way_out = KINDS[request.param]
    if make is spread or "DTensor" in request.param:
        request.getfixturevalue("process_group")
    return SimpleNamespace(tensor=make(good()), way_out=way_out, name=request.param)


def some(first: list[object], rest: list[object]) -> list[object]:
    """For every function: two kinds tell whether it looks at its tensors at all, the rest with
    `-m slow`.
    """
    return [*first, *(pytest.param(one, marks=pytest.mark.slow) for one in rest)]


@pytest.mark.parametrize("call", [*CALLS, *BATCHES, *METHODS])
@pytest.mark.parametrize(
    "strange",
    some(
        ["DTensor", "view of an empty storage"],
        ["wrapper", "FakeTensor", "meta", "vmap", "quantised"],
    ),
    indirect=True,
)
def test_every_function_refuses_them_by_name(call, strange):
    function, name = {**CALLS, **BATCHES, **METHODS}[call]
    if strange.name == "DTensor" and call in SHARDED:
        function(strange.tensor)
        return
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
        *([] if kind == "DTensor" else [lambda: pymerge.merge([ours], method="passthrough")]),
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


class Answering(torch.Tensor):
    """Answers every question about itself with the same."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return cls.answer()


def class_of(**members: object) -> type[torch.Tensor]:
    return type("Odd", (torch.Tensor,), members)


@pytest.mark.parametrize("call", [*CALLS, *BATCHES, *METHODS])
@pytest.mark.parametrize(
    "kind",
    some(
        [
            class_of(data_ptr=lambda self: 4096),
            type("Nothing", (Answering,), {"answer": staticmethod(lambda: None)}),
        ],
        [
            class_of(shape=(1 << 20, 1 << 20)),
            class_of(stride=lambda self: (1 << 20, 1)),
            class_of(dtype=torch.float64),
            type("Zeros", (Answering,), {"answer": staticmethod(lambda: torch.zeros(1))}),
            type("Raising", (Answering,), {"answer": staticmethod(lambda: 1 // 0)}),
        ],
    ),
)
def test_classes_that_say_otherwise_than_their_memory(call, kind):
    function, name = {**CALLS, **BATCHES, **METHODS}[call]
    with pytest.raises(TypeError, match=rf"{name} .*{kind.__name__}.*as_subclass\(torch.Tensor\)"):
        function(torch.Tensor.as_subclass(good(), kind))


class Later(dict):
    """A state dict that gives another tensor from a certain read on."""

    def __init__(self, tensor: Tensor, reads: int, change) -> None:
        super().__init__(w=tensor)
        self.reads, self.change = reads, change

    def __getitem__(self, name: str) -> Tensor:
        self.reads -= 1
        found = super().__getitem__(name)
        return found if self.reads >= 0 else self.change(found)


def freed(x: Tensor) -> Tensor:
    return cut(x.clone(), 0)


@pytest.mark.parametrize("reads", range(5))
@pytest.mark.parametrize("change", [freed, lambda x: x.to("meta"), lambda x: x[:1]])
@pytest.mark.parametrize(
    "merge",
    [
        lambda later, x: pymerge.ties([later, {"w": x}], {"w": x}),
        lambda later, x: pymerge.select([later, {"w": x}], {"w": x}),
        lambda later, x: pymerge.merge([later, {"w": x}], {"w": x}),
        lambda later, x: pymerge.merge([{"w": x}, later], method="linear"),
        lambda later, x: pymerge.merge([later], method="passthrough"),
        lambda later, x: pymerge.merge([{"w": x}] * 2, {"w": x}, out=later),
    ],
)
def test_mappings_that_give_others_when_they_are_asked_again(merge, change, reads):
    """Refused by name, or not asked so often: never read where nothing is."""
    later = Later(torch.randn(64, 64), reads, change)
    try:
        merge(later, torch.randn(64, 64))
    except (TypeError, ValueError) as refused:
        assert "w" in str(refused) or "out" in str(refused)
        assert later.reads < 0
    else:
        assert later.reads >= 0
