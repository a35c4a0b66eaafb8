"""`torch.ops.pymerge`: what torch.compile and torch.export put into their graphs gives the same bits
as the functions called eagerly, and shapes where there are no values.
"""

from __future__ import annotations

import inspect
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_unflatten

import pymerge
from pymerge.ops import registered
from pymerge.rules.types import MatsKeywords

Tensor = torch.Tensor
ops = torch.ops.pymerge


def some(count: int, *shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(shape or (6, 5), generator=generator).to(dtype) for _ in range(count)]


def grams(count: int, width: int = 5) -> list[Tensor]:
    return [x.T @ x for x in some(count, 2 * width, width)]


# Name -> op, arguments, keywords.
CALLS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "ties": ("ties", (some(3), some(4)[3]), {}),
    "ties, task vectors": ("ties", (some(2),), {"density": [0.5, 1.0]}),
    "ties, options": (
        "ties",
        (some(2, dtype=torch.bfloat16), some(3)[2]),
        {"weights": [1.0, -0.5], "scaling": 0.7, "trim": "random", "seed": 9, "name": "w"},
    ),
    "ties, another dtype": ("ties", (some(2), some(3)[2]), {"dtype": torch.bfloat16}),
    "ties, strided": ("ties", ([x.T for x in some(2)],), {"flavor": "paper"}),
    "ties, reference": ("ties", (some(2),), {"backend": "reference", "non_finite": "allow"}),
    "ties, empty": ("ties", (some(2, 0),), {}),
    "select": ("select", (some(3), some(4)[3]), {"density": [0.1, 0.5, 1.0]}),
    "select in fp64": ("select", (some(2, dtype=torch.float64),), {"flavor": "peft"}),
    "gram": ("gram", (some(3), some(4)[3]), {}),
    "gram of rows": ("gram", (some(2, 3, 4, 5),), {"per": "row"}),
    "gram of columns": ("gram", (some(2, 3, 4, 5),), {"per": "column"}),
    "combine": ("combine", (some(2), torch.tensor([0.5, 2.0]), some(3)[2]), {}),
    "combine rows": (
        "combine",
        (some(2), torch.rand(6, 2, dtype=torch.float64)),
        {"per": "row", "dtype": torch.float16},
    ),
    "cg": ("cg", (some(2), grams(2)), {"iterations": 3}),
    "cg of both sides": (
        "cg",
        (some(2), grams(2), grams(2, 6), some(3)[2]),
        {"init": "pretrained", "task_weights": [1.0, 2.0], "precision": "fp64"},
    ),
    "cg that cannot": ("cg", (some(2), [torch.zeros(5, 5)] * 2, None, None, some(3)[2]), {}),
    "regmean": ("regmean", (some(2), grams(2)), {"off_diagonal": 0.9}),
    "weighted_average": (
        "weighted_average",
        (some(2), [x.abs() for x in some(2)]),
        {"minimum": 1e-6},
    ),
    "merge": (
        "merge",
        (
            [*some(4), *some(6)[4:]],
            "{'function': 'merge', 'names': ['v', 'w'], 'base': True, 'dtypes': None,"
            " 'options': {'method': 'dare_ties', 'density': 0.5}}",
        ),
        {},
    ),
}
CHECKS = (
    "test_schema",
    "test_faketensor",
    "test_autograd_registration",
    "test_aot_dispatch_static",
    "test_aot_dispatch_dynamic",
)


@pytest.mark.filterwarnings("ignore:.*keeps its initialisation")
@pytest.mark.parametrize("call", CALLS)
def test_opcheck(call: str) -> None:
    op, args, kwargs = CALLS[call]
    torch.library.opcheck(getattr(ops, op).default, args, kwargs, test_utils=CHECKS)


@pytest.mark.filterwarnings("ignore:.*keeps its initialisation")
@pytest.mark.parametrize("call", CALLS)
def test_meta_and_fake_tensors_have_the_results_shape(call: str) -> None:
    op, args, kwargs = CALLS[call]
    flat, spec = tree_flatten(args)
    function = getattr(ops, op)
    want, _ = tree_flatten(function(*args, **kwargs))

    def results(made: Callable[[Tensor], Tensor]) -> list[Tensor]:
        given = tree_unflatten([made(x) if isinstance(x, Tensor) else x for x in flat], spec)
        return tree_flatten(function(*given, **kwargs))[0]

    for got in results(lambda x: x.to("meta")), results(FakeTensorMode().from_tensor):
        assert [(x.shape, x.dtype) for x in got] == [(x.shape, x.dtype) for x in want]
        assert not any(type(x) is Tensor and x.device.type == "cpu" for x in got)


def functions() -> dict[str, Callable[..., Any]]:
    """What is compiled, of two models and a base."""
    out = torch.bfloat16
    one = {
        "ties": lambda a, b, c: pymerge.ties([a * 2, b], c, density=0.5, weights=(1, 0.5)) + 1,
        "ties of a stack": lambda a, b, c: pymerge.ties(torch.stack([a, b]), c),
        "ties into": lambda a, b, c: pymerge.ties([a, b], c, out=torch.empty(6, 5, dtype=out)),
        "select": lambda a, b, c: pymerge.select([a * 2, b], c, density=0.5),
        "gram": lambda a, b, c: pymerge.gram([a * 2, b], c, per="row") * 2,
        "combine": lambda a, b, c: pymerge.combine([a * 2, b], [0.5, 2], c),
        "combine by a tensor": lambda a, b, c: pymerge.combine([a, b], c[0, :2], c),
        "combine into": lambda a, b, c: pymerge.combine(
            [a, b], [1, 2], c, out=torch.empty(6, 5, dtype=out)
        ),
        "slerp": lambda a, b, c: pymerge.slerp([a * 2, b], t=0.3),
        "slerp from a base": lambda a, b, c: pymerge.slerp([a * 2], b, t=0.3),
        "karcher": lambda a, b, c: pymerge.karcher([a, b, c]),
        "nearswap": lambda a, b, c: pymerge.nearswap([a * 2], c, t=0.3),
        "sce": lambda a, b, c: pymerge.sce([a * 2, b], c, select_topk=0.5, flavor="mergekit"),
        "wudi": lambda a, b, c: pymerge.wudi([a * 2, b], c),
        "cg": lambda a, b, c: ops.cg(
            [a.detach(), b.detach()], [a.detach().T @ a.detach()] * 2, None, c.detach()
        ),
        "slerp of state dicts": lambda a, b, c: pymerge.slerp([{"w": a}, {"w": b}], t=0.3),
    }

    def states(
        a: Tensor, b: Tensor, c: Tensor
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        # Integers are copied, and are the base's.
        models = [{"w": a * 2, "v'": b, "n": a.long()}, {"v'": a, "w": b + 1, "n": c.long()}]
        return models, {"w": c, "v'": c * 2, "n": c.long()}

    for method, options in {
        "linear": {"weight": [1, 2]},
        "ties": {"density": 0.4, "normalize": False},
        "dare_linear": {"density": 0.4, "seed": 3, "rescale": True},
        "breadcrumbs_ties": {"gamma": 0.1, "scope": "model"},
        "ram": {"epsilon": 1e-3},
        "model_stock": {"filter_wise": True},
        "passthrough": {},
    }.items():

        def merge(*given: Tensor, method: Any = method, options: Any = options) -> object:
            models, base = states(*given)
            if method == "passthrough":
                return pymerge.merge(models[:1], method=method)
            return pymerge.merge(models, None if method == "linear" else base, method=method,
                                 **options)  # fmt: skip

        one[f"merge, {method}"] = merge
    one["ties of state dicts"] = lambda *given: pymerge.ties(*states(*given), flavor="paper")
    return one


FUNCTIONS = functions()
INDUCTOR = pytest.param(
    "inductor",
    marks=[
        pytest.mark.slow,
        pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"),
    ],
)


@pytest.fixture(autouse=True)
def _no_compiled_code() -> None:
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.*differs? (in|between)")
@pytest.mark.parametrize("backend", ["eager", "aot_eager", INDUCTOR])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_compiled_function_gives_the_same_bits(name: str, backend: str) -> None:
    function = FUNCTIONS[name]
    inputs = [x.requires_grad_() for x in some(3)]
    want, kind = tree_flatten(function(*inputs))
    got, other = tree_flatten(torch.compile(function, fullgraph=True, backend=backend)(*inputs))
    assert kind == other
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y) and x.dtype == y.dtype and x.requires_grad == y.requires_grad


def test_one_graph_serves_other_values_and_sizes() -> None:
    def merge(a: Tensor, b: Tensor, density: float) -> Tensor:
        return pymerge.ties([a, b], density=density) + pymerge.slerp([a, b], t=density)

    compiled = torch.compile(merge, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((4, 4), (7, 3), (50, 2)):
        for density in (0.3, 0.5, 0.7):
            a, b = some(2, *shape)
            assert torch.equal(compiled(a, b, density), merge(a, b, density))


def test_an_exported_function_holds_the_op() -> None:
    class Merging(torch.nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return pymerge.ties([a, b], density=0.5)

    a, b = some(2)
    program = torch.export.export(Merging(), (a, b))
    assert ops.ties.default in [node.target for node in program.graph.nodes]
    assert torch.equal(program.module()(b, a), pymerge.ties([b, a], density=0.5))


def test_options_in_tensors_are_read_between_graphs() -> None:
    def merge(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
        return pymerge.ties([a * 2, b], density=0.5, weights=weights) + 1

    a, b = some(2)
    weights = torch.tensor([0.5, 2.0])
    got = torch.compile(merge, backend="eager")(a, b, weights)
    assert torch.equal(got, merge(a, b, weights))


def test_what_does_not_fit_is_said_when_the_graph_is_made() -> None:
    a, b = some(2)
    for call, words in (
        (lambda: pymerge.ties([a, b], density=20), "density.*20 is outside"),
        (lambda: pymerge.ties([a, b[1:]]), "shape"),
        (lambda: pymerge.gram([a, b], per="line"), "per='line' is not one of"),
        (lambda: pymerge.merge([{"w": a}, {"v": b}]), "different names"),
    ):
        with pytest.raises(Exception, match=words):
            torch.compile(call, fullgraph=True, backend="eager")()


def test_what_is_wrong_with_values_is_said_when_the_graph_runs() -> None:
    a, b = some(2)
    compiled = torch.compile(lambda a, b: pymerge.ties([a, b]), fullgraph=True, backend="aot_eager")
    compiled(a, b)
    a[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or infinite task vector elements.*models\[0\]: 1"):
        compiled(a, b)


def test_ops_have_no_gradient_and_say_so() -> None:
    a, b = (x.requires_grad_() for x in some(2))
    with pytest.raises(RuntimeError, match="no autograd formula"):
        ops.ties([a, b]).sum().backward()


@pytest.mark.parametrize("name", registered.TABLE)
def test_schemas_have_the_functions_arguments(name: str) -> None:
    """All of them, but for those that no graph can hold."""
    op = registered.TABLE[name]
    function = inspect.signature(getattr(pymerge, op.function)).parameters
    own = {each.name for each in getattr(ops, name).default._schema.arguments}
    theirs = set(function) | {"out"}
    if "options" in theirs:  # of mats
        theirs |= set(MatsKeywords.__annotations__)
    renamed = {"dtype": "out", "start": "init"}
    assert {renamed.get(each, each) for each in own} <= theirs
    missing = theirs - {renamed.get(each, each) for each in own}
    assert missing <= {"out", "init_options", "name", "options", *op.fixed}


def test_torch_is_imported_and_ops_are_registered_by_the_first_use() -> None:
    code = (
        "import sys, pymerge; assert 'torch' not in sys.modules; import torch;"
        " f = torch.compile(lambda x: pymerge.ties([x, x]), fullgraph=True, backend='eager');"
        " x = torch.ones(4); assert torch.equal(f(x), x), f(x); print(torch.ops.pymerge.gram([x]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "4." in done.stdout, done.stderr
