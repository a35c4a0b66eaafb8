"""Every public function, with tensors of dtypes that it does not take and under torch's modes: the
right answer, or an error that names the argument (E1, E3 and E5).
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy
import pytest
import torch
from tensor_cases import BATCHES, CALLS, COPIES, COPIES_COMPLEX, METHODS, eye, good
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode

import pymerge
from pymerge.compat import mergekit, peft

ROOT = Path(pymerge.__file__).parent
Tensor = torch.Tensor
pytestmark = pytest.mark.filterwarnings("ignore")


def named(name: str, what: str) -> str:
    """In a state dict, `models[0]['w']` or `tensor 'w': models[0]`."""
    return rf"({name}|'w'.*)(\[0\])? is {what}"


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("dtype", "what", "copies"),
    [
        (torch.float8_e4m3fn, "float8_e4m3fn;", COPIES),
        (torch.complex64, "complex64;", COPIES_COMPLEX),
    ],
)
def test_a_dtype_that_is_not_merged_is_refused_by_name(call, dtype, what, copies):
    function, name = CALLS[call]
    if call not in copies:
        with pytest.raises(TypeError, match=named(name, what)):
            function(good().to(dtype))


STATE_DICTS_TOO = ("peft prune", "peft ties", "dare", "dare ties", "ties reference")
STATE_DICTS_TOO += ("ties random", "select reference")
# Where a dict in a dict is what a training loop saved.
STATE_DICTS_TOO += ("linear", "passthrough", "merge base", "merge by statistics")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("value", [[1.0, 2.0], "text", 3, numpy.ones((4, 4)), {"w": good()}])
def test_what_is_no_tensor_is_a_type_error(call, value):
    if isinstance(value, dict) and call in STATE_DICTS_TOO:
        return
    with pytest.raises((TypeError, ValueError), match=r"pass|return|is not|are not|leave out"):
        CALLS[call][0](value)


# Modes under which results are what they are without.


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Listening(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES = {
    "meta by default": lambda: torch.device("meta"),
    "float64 by default": lambda: default_dtype(torch.float64),
    "float16 by default": lambda: default_dtype(torch.float16),
    "inference": torch.inference_mode,
    "deterministic": deterministic,
    "a dispatch mode": Watching,
    "a function mode": Listening,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


def tensors_in(result: object) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result.detach()]
    if isinstance(result, Mapping):
        return [x for value in result.values() for x in tensors_in(value)]
    if isinstance(result, (list, tuple)):
        return [x for value in result for x in tensors_in(value)]
    return []


def called(function, x: object, mode: AbstractContextManager[object]) -> object:
    torch.manual_seed(0)
    with mode:
        return function(x)


def inputs(call: str) -> object:
    if "losses" in call:
        return torch.ones(4, requires_grad=True)
    if "numbers" in call:
        return torch.tensor([3, 1, 4, 2])
    return good().clone().requires_grad_(call == "logits")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("call", [*CALLS, *BATCHES])
def test_modes_that_change_no_result(call, mode):
    function, _ = {**CALLS, **BATCHES}[call]
    if mode == "autocast" and call in ("logits", "a mask of predictions"):
        return  # which a model computes, in the precision of its caller
    try:
        wanted = called(function, inputs(call), torch.enable_grad())
    except (TypeError, ValueError) as refused:
        with pytest.raises(type(refused), match=re.escape(str(refused)[:20])):
            called(function, inputs(call), MODES[mode]())
        return
    got = tensors_in(called(function, inputs(call), MODES[mode]()))
    wanted = tensors_in(wanted)
    assert wanted and len(got) == len(wanted)
    for ours, theirs in zip(got, wanted, strict=True):
        assert type(ours) is Tensor and ours.device.type == "cpu"
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("call", [*CALLS, *BATCHES])
@pytest.mark.parametrize("kind", ["requires grad", "inference", "parameter", "imaginary part"])
def test_kinds_that_are_read_like_any_tensor(call, kind):
    function, _ = {**CALLS, **BATCHES}[call]

    def made() -> Tensor:
        x = inputs(call).detach()
        if kind == "requires grad" and x.is_floating_point():
            return x.clone().requires_grad_()
        if kind == "parameter" and x.is_floating_point():
            return torch.nn.Parameter(x.clone())
        if kind == "imaginary part" and x.is_floating_point():
            return torch.complex(x, x).imag
        with torch.inference_mode():
            return x.clone()

    try:
        wanted = tensors_in(called(function, inputs(call), torch.enable_grad()))
    except (TypeError, ValueError) as refused:
        with pytest.raises(type(refused)):
            function(made())
        return
    if call in ("losses", "logits"):  # which need a graph of their own
        return
    if call == "ties out" and kind == "imaginary part":
        with pytest.raises(ValueError, match="not contiguous"):
            function(made())
        return
    got = tensors_in(called(function, made(), torch.enable_grad()))
    assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))


# What traces or imitates torch's operations would have no merge in its graph.


@pytest.mark.parametrize("call", [*CALLS, *BATCHES, *METHODS])
def test_tracers_are_refused(call):
    function, _ = {**CALLS, **BATCHES, **METHODS}[call]
    x = inputs(call).detach()
    with pytest.raises(TypeError, match=r"inside of FakeTensorMode, .*; call this outside"):
        called(function, x, FakeTensorMode(allow_non_fake_inputs=True))
    with pytest.raises(TypeError, match=r"inside of make_fx, .*; call this outside"):
        make_fx(function)(x)
    with pytest.raises(TypeError, match=r"inside of torch\.jit\.trace, .*; call this outside"):
        torch.jit.trace(function, x, check_trace=False)


def test_constants_inside_of_vmap_are_merged():
    seen = []
    torch.vmap(lambda x: (seen.append(pymerge.ties([good(), good()], density=1.0)), x)[1])(good())
    assert torch.equal(seen[0], good())


# Every tensor of the package's own is of a device and a dtype that no default changes.


def factories() -> list[tuple[Path, ast.Call]]:
    names = {function.__name__ for function in _device_constructors()}
    return [
        (path.relative_to(ROOT), node)
        for path in sorted(ROOT.rglob("*.py"))
        if "bench" not in path.relative_to(ROOT).parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in names
        and ast.unparse(node.func.value) in ("torch", "self._torch")
    ]


def test_tensors_are_made_on_a_device_of_a_dtype():
    found = factories()
    assert len(found) > 20
    without = [
        f"{path}:{node.lineno}: {ast.unparse(node)}"
        for path, node in found
        if not {"device", "dtype"} <= {keyword.arg for keyword in node.keywords}
    ]
    assert without == []


# One tensor where a list is asked for.


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: pymerge.ties(good(), good()), "models is a Tensor; pass models in a list"),
        (lambda: pymerge.select(good(), good()), "models is a Tensor; pass models in a list"),
        (lambda: pymerge.merge(good(), good()), "models is a Tensor; pass models in a list"),
        (lambda: pymerge.ties(torch.ones(())), "models is a Tensor; pass models in a list"),
        (lambda: pymerge.ties(iter([good()])), "models is a .*iterator; pass several models in a"),
        (lambda: pymerge.mats(good(), [eye()], base=good()), "weights is a Tensor; pass weights"),
        (lambda: pymerge.mats({"w": good()}, [eye()]), "weights is a dict; pass"),
        (lambda: pymerge.mats([good()], torch.ones(())), "input_grams is a Tensor; pass"),
        (lambda: pymerge.weighted_average(good(), [good()], base=good()), "weights is a Tensor"),
        (lambda: pymerge.weighted_average([good()], torch.ones(())), "fishers is a Tensor; pass"),
        (lambda: peft.ties(torch.ones(()), [1.0], 0.5), "task_tensors is a Tensor; pass a list"),
        (lambda: mergekit.merge_tensors(torch.ones(()), "linear"), "tensors is a Tensor; pass"),
    ],
)
def test_one_tensor_instead_of_a_list(call, said):
    with pytest.raises(TypeError, match=said):
        call()


def test_stacked_models_are_models():
    stack = torch.stack([good(), good() * 2])
    wanted = pymerge.ties([good(), good() * 2], good(), density=0.5)
    assert torch.equal(pymerge.ties(stack, good(), density=0.5), wanted)


# What else the statistics are told.


@pytest.mark.parametrize(
    ("init", "error", "said"),
    [
        ({"v": good()}, ValueError, "init lacks w; pass a whole state dict"),
        (good(), TypeError, "init is a Tensor; pass 'average'.* or a state dict"),
        (3, TypeError, "init is an? int; pass 'average'.* or a state dict"),
        ({"w": good()[:2]}, ValueError, r"tensor 'w': init has shape \(2, 4\)"),
        ("averge", ValueError, "did you mean 'average'"),
    ],
)
@pytest.mark.parametrize("method", ["mats", "regmean", "fisher"])
def test_initial_models_that_do_not_fit(init, error, said, method):
    from tensor_cases import by_statistics

    with pytest.raises(error, match=said):
        by_statistics(method, init=init)
    with pytest.raises(error, match=said):  # before it is needed, as a rule of the whole merge
        pymerge.merge_with_statistics(
            [{"w": good()}] * 2, {"w": good()}, [Nothing()] * 2, method, init=init
        )


@dataclasses.dataclass
class Nothing:
    """Statistics of nothing at all."""

    def __getattr__(self, name: str):
        if name in ("input_gram", "output_grad_gram", "block_fisher", "diagonal_fisher"):
            return lambda layer: None
        raise AttributeError(name)


@pytest.mark.parametrize("numbers", [[1, 2, 3, "4"], [1.0, 2, 3, 4], 4, "1234", None])
def test_numbers_of_examples_are_integers(numbers):
    batch = {"input": good(), "example_numbers": numbers}
    if numbers is None:
        assert BATCHES["a named batch"][0](good()) is not None
        return
    with pytest.raises(TypeError, match="example_numbers"):
        pymerge.statistics.collect(
            torch.nn.Sequential(torch.nn.Linear(4, 2)), [batch], kinds=("input_gram",)
        )


def test_statistics_of_complex_layers_are_refused():
    model = torch.nn.Sequential(torch.nn.Linear(4, 2, dtype=torch.complex64))
    with pytest.raises(TypeError, match="complex64; statistics are of real numbers"):
        pymerge.statistics.collect(model, [torch.complex(good(), good())], kinds=("input_gram",))


def test_inference_batches_are_those_that_they_look_like():
    """Layers that read one inference tensor share no Gram matrix, as it may change in between."""

    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            with torch.inference_mode():
                x.mul_(2)
            return y + self.second(x)

    with torch.inference_mode():
        batch = good().clone()
    found = pymerge.statistics.collect(Twice(), lambda: [batch.clone()], kinds=("input_gram",))
    assert torch.equal(4 * found.input_gram("first"), found.input_gram("second"))


def test_integer_tensors_that_differ_are_not_merged_by_the_drop_in():
    a, b = torch.arange(4), torch.arange(4) + 1
    assert torch.equal(mergekit.merge_tensors([a, a], "linear"), a)
    with pytest.raises(ValueError, match="tensors are not floating point and differ"):
        mergekit.merge_tensors([a, b], "linear", parameters={"weight": 1})
    with pytest.raises(TypeError, match=r"models\[1\]\['w'\] is int64; linear takes float32"):
        mergekit.merge_state_dicts([{"w": a.float()}, {"w": b}], "linear")


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (torch.ones(3, 4) > 0, r"task_tensors has shape \(4, 4\), majority_sign_mask \(3, 4\)"),
        (torch.tensor(True), "majority_sign_mask"),
    ],
)
def test_masks_of_another_shape(mask, said):
    with pytest.raises(ValueError, match=said):
        peft.disjoint_merge(good(), mask)
