"""Small layers of `mats` solved whole by one block of threads, by Triton and by CUDA, against plain
torch (docs/spec/mats.md, M6 to M9).
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mats_cases import case, relative

from pymerge.backends import cuda, native, registry
from pymerge.backends.cg.cuda import solve_small
from pymerge.backends.cg.device import LARGEST, SmallKernel, SmallLayers
from pymerge.backends.cg.iteration import CgState, conjugate_gradient
from pymerge.backends.registry import small_kernel
from pymerge.ops.mats import small_layers
from pymerge.ops.mats.api import MatsLayer, mats_many
from pymerge.ops.mats.system import Operator, Preconditioner, System, build
from pymerge.rules.mats import resolve

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(params=["triton", "emulated"])
def backend(request: pytest.FixtureRequest) -> str:
    """The backend's name; "emulated": CUDA's kernel, run on the host by tests/cuda_emulation."""
    if request.param == "emulated":
        request.getfixturevalue("emulated_cuda")
        return "cuda"
    if registry.why_not("triton") is not None or not registry.serves("triton", "cpu"):
        pytest.skip("TRITON_INTERPRET=1 lets Triton take tensors on the CPU")
    return "triton"


@pytest.fixture
def kernel(backend: str) -> SmallKernel:
    found = small_kernel("cpu", backend)
    assert found is not None
    return found


@pytest.fixture
def uninitialised_is_nan() -> Iterator[None]:
    """What `torch.empty` gives holds NaN, so that what is read before it is written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def stack(
    shape: tuple[int, int], layers: int = 2, count: int = 2, with_b: bool = True, seed: int = 0
) -> tuple[System, torch.Tensor]:
    """A system and its right-hand side."""
    cases = [case(count, *shape, seed=seed + i, dtype=torch.float32) for i in range(layers)]
    system = build(
        [torch.stack(c.a) for c in cases],
        [torch.stack(c.b) for c in cases] if with_b else None,
        resolve(count),
        torch.float32,
        layers,
    )
    g = torch.Generator().manual_seed(seed)
    return system, torch.randn(layers, *shape, generator=g)


def solve(
    kernel: SmallKernel | None,
    system: System,
    rest: torch.Tensor,
    iterations: int,
    *,
    step: torch.Tensor | None = None,
    tolerance: float = 0.0,
    limit: torch.Tensor | None = None,
    small: torch.Tensor | None = None,
    preconditioner: bool = True,
    change: Callable[[Preconditioner], None] = lambda inverses: None,
) -> tuple[CgState, torch.Tensor]:
    """(what the run leaves, its residual) by a kernel, None for plain torch's."""
    rule = resolve(system.a.shape[1], objective_tolerance=tolerance, preconditioner=preconditioner)
    inverses = Preconditioner(system, rule, 0.01)
    change(inverses)
    step, r = torch.zeros_like(rest) if step is None else step.clone(), rest.clone()
    none = torch.zeros(len(rest), dtype=torch.float64) if small is None else small
    if kernel is not None:
        got = small_layers.solve(
            kernel, system, inverses, step, r, tolerance, iterations, limit, none
        )
        return got, r
    operator = Operator(system, rest.shape[1], "fp32")
    turned = inverses if preconditioner else None
    return conjugate_gradient(operator, turned, step, r, rule, iterations, limit, none), r


def same(got: tuple[CgState, torch.Tensor], want: tuple[CgState, torch.Tensor], scale: float) -> None:  # fmt: skip
    for name in ("iterations", "converged", "limited", "broke"):
        assert torch.equal(getattr(got[0], name), getattr(want[0], name)), name
    # The residual vanishes: what counts is its error beside its first size.
    assert relative(got[0].step, want[0].step) < 5e-6
    assert float((got[1] - want[1]).norm()) < 5e-6 * scale


# Vectors and few rows, with a column's sum shared by several threads or not; one tile, its edges,
# several of them.
SHAPES = [(1, 1), (1, 40), (1, 256), (3, 33), (4, 65), (4, 129), (5, 7), (40, 17), (64, 64), (65, 20), (20, 70), (130, 66), (256, 3)]  # fmt: skip


# Seconds each in the interpreter.
LARGE = [(1, 256), (4, 129), (64, 64), (130, 66), (256, 3)]
# Every shape, and every pair of the two options on a vector and on two matrices.
RUNS = [
    pytest.param(
        shape, True, True, marks=pytest.mark.slow if INTERPRETED and shape in LARGE else ()
    )
    for shape in SHAPES
]
RUNS += [
    (shape, *options)
    for shape in [(1, 40), (5, 7), (20, 70)]
    for options in [(True, False), (False, True), (False, False)]
]


@pytest.mark.parametrize(("shape", "with_b", "preconditioner"), RUNS)
def test_a_run(
    kernel: SmallKernel,
    shape: tuple[int, int],
    with_b: bool,
    preconditioner: bool,
    uninitialised_is_nan: None,
) -> None:
    system, rest = stack(shape, with_b=with_b)
    step = 0.1 * rest.flip(0)
    small = 1e-6 * rest.flatten(1).norm(dim=1).double()
    want, got = (
        solve(k, system, rest, 3, step=step, small=small, preconditioner=preconditioner)
        for k in (None, kernel)
    )
    assert want[0].iterations.tolist() == [min(3, shape[0] * shape[1])] * 2
    same(got, want, float(rest.norm()))


def test_the_largest(kernel: SmallKernel) -> None:
    if kernel.__module__.startswith("pymerge.triton"):
        pytest.skip("many minutes in the interpreter")
    system, rest = stack((256, 256), layers=1)
    want, got = (solve(k, system, rest, 1) for k in (None, kernel))
    same(got, want, float(rest.norm()))


def test_every_layer_stops_for_its_own_reason(kernel: SmallKernel) -> None:
    """By its residual, before its first iteration and later, by its objective, at the limit of its
    step, by a curvature that is NaN, infinite or negative, and one not at all. What had stopped is
    as it was left.
    """
    shape, layers = (12, 9), 8
    system, rest = stack(shape, layers)
    assert system.b is not None
    rest[6] *= 1e-3
    system.b[3], system.b[5] = torch.nan, -system.b[5]
    system.a[4], system.b[4] = torch.eye(9), 3e38 * torch.eye(12).repeat(1, 2)
    lengths = [solve(None, system, rest, n)[0].step[2].norm().double() for n in (1, 2)]
    assert lengths[0] < 0.99 * lengths[1]
    small = rest.flatten(1).norm(dim=1).double() * torch.tensor([2, 0.2, 0, 0, 0, 0, 0, 0])
    limit = torch.full((layers,), torch.inf, dtype=torch.float64)
    limit[2] = sum(lengths) / 2
    options: dict[str, Any] = {"limit": limit, "small": small, "tolerance": 0.003}
    want, got = (solve(k, system, rest, 5, **options) for k in (None, kernel))
    same(got, want, float(rest.norm()))
    state = got[0]
    assert state.iterations[[0, 2, 3, 4, 5]].tolist() == [0, 2, 0, 0, 0]
    assert state.converged[:2].all() and not state.converged[2:6].any()
    assert state.limited.nonzero().flatten().tolist() == [2]
    assert abs(float(state.step[2].norm() / limit[2]) - 1) < 1e-6
    assert state.broke.nonzero().flatten().tolist() == [3, 4, 5]
    assert not state.step[[0, 3, 4, 5]].any() and torch.equal(got[1][3:6], rest[3:6])
    unlimited = [solve(k, system, rest, 5, tolerance=0.003)[0] for k in (None, kernel)]
    assert unlimited[1].iterations.tolist() == unlimited[0].iterations.tolist()
    assert 1 < unlimited[1].iterations[7] < 5 and unlimited[1].converged[7]


def test_breakdown_after_some_iterations(kernel: SmallKernel) -> None:
    system, rest = stack((12, 9))
    assert system.b is not None
    bad, basis = torch.linalg.eigh(system.b[0, :, :12])
    bad[:2] = -bad[-1] / 50
    system.b[0, :, :12] = basis @ torch.diag(bad) @ basis.T
    system.b[0, :, 12:] = 0
    want, got = (solve(k, system, rest, 12, preconditioner=False) for k in (None, kernel))
    assert 0 < want[0].iterations[0] < 12 and want[0].broke.tolist() == [True, False]
    for name in ("iterations", "converged", "limited", "broke"):
        assert torch.equal(getattr(got[0], name), getattr(want[0], name)), name
    assert relative(got[0].step, want[0].step) < 1e-4


def test_a_preconditioner_that_is_not_positive(kernel: SmallKernel) -> None:
    """<r, z> is negative where <p, q> is not."""
    system, rest = stack((6, 5))

    def turned(inverses: Preconditioner) -> None:
        assert inverses.right is not None
        inverses.right[0].neg_()

    want, got = (solve(k, system, rest, 2, change=turned) for k in (None, kernel))
    same(got, want, float(rest.norm()))
    assert got[0].broke.tolist() == [True, False] and got[0].iterations.tolist() == [0, 2]


def test_a_limit_that_the_first_step_is_beyond(kernel: SmallKernel) -> None:
    """The run starts outside: nothing is left of the room, and the step shrinks to the limit or
    stays.
    """
    system, rest = stack((6, 5))
    step = rest.clone()
    limit = 0.5 * rest.flatten(1).norm(dim=1).double()
    want, got = (solve(k, system, rest, 3, step=step, limit=limit) for k in (None, kernel))
    same(got, want, float(rest.norm()))
    assert got[0].limited.all() and got[0].iterations.tolist() == [1, 1]


@pytest.mark.parametrize("shape", [(3, 40), (20, 70)])
@pytest.mark.parametrize("with_b", [True, False])
def test_bits_are_of_the_layer_alone(
    kernel: SmallKernel,
    shape: tuple[int, int],
    with_b: bool,
) -> None:
    """Alone, in a stack, with matrices that layers share or their own copies of them, again; and
    nothing else is written.
    """

    stacked: list[int] = []

    def guarded(problem: SmallLayers) -> None:
        stacked.append(len(problem.a))
        held = {name: getattr(problem, name) for name in ("step", "r", "scratch", "state")}
        inside = {}
        for name, tensor in held.items():
            wide = torch.full((tensor.numel() + 200,), torch.nan, dtype=tensor.dtype)
            inside[name] = wide[100:-100].view(tensor.shape)
            if name != "scratch":
                inside[name].copy_(tensor)
        kernel(replace(problem, **inside))
        for name, tensor in inside.items():
            wide = tensor.new_empty(0).set_(tensor.untyped_storage())
            assert wide[:100].isnan().all() and wide[-100:].isnan().all(), name
            held[name].copy_(tensor)
        # Of a scratch that is too large or used twice a part stays as it was.
        assert not any(tensor.isnan().any() for tensor in held.values())

    one = case(2, *shape, dtype=torch.float32)
    others = [case(2, *shape, seed=i, dtype=torch.float32) for i in range(2)]
    bs = [torch.stack(c.b) for c in others] if with_b else None
    a = torch.stack(one.a)
    rule = resolve(2)
    shared = build([a], bs, rule, torch.float32, 2)
    copied = build([a.clone() for _ in range(2)], bs, rule, torch.float32, 2)
    assert shared.shared and not copied.shared
    rest = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    states = [solve(guarded, system, rest, 2) for system in (shared, copied, shared)]
    assert stacked == [1, 2, 1]
    for state, r in states[1:]:
        assert torch.equal(state.step, states[0][0].step) and torch.equal(r, states[0][1])
    for i in range(2):
        alone, r = solve(guarded, copied.layer(i), rest[i : i + 1], 2)
        assert torch.equal(alone.step[0], states[0][0].step[i])
        assert torch.equal(r[0], states[0][1][i])


def beside_a_forbidden_page(tensor: torch.Tensor, behind: bool) -> torch.Tensor:
    """The tensor in memory of its own, in front of or behind a page that nobody may touch."""
    page = mmap.PAGESIZE
    pages = -(-tensor.nbytes // page)
    region = mmap.mmap(-1, (pages + 1) * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    forbidden, begin = (0, page) if behind else (pages * page, pages * page - tensor.nbytes)
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + forbidden), page, 0) == 0
    flat = torch.frombuffer(region, dtype=tensor.dtype, count=tensor.numel(), offset=begin)
    return flat.view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("shape", [(1, 40), (3, 33), (5, 7), (20, 70), (70, 20), (64, 80)])
@pytest.mark.parametrize("with_b", [True, False])
def test_cuda_reads_and_writes_its_operands_only(
    emulated_cuda: None, shape: tuple[int, int], with_b: bool
) -> None:
    """In a process of its own, which an access beyond an operand ends."""
    system, rest = stack(shape, with_b=with_b)
    steps = []
    for behind in (True, False):
        problems: list[SmallLayers] = []
        solve(problems.append, system, rest, 2)
        moved = {
            name: beside_a_forbidden_page(value, behind)
            for name, value in vars(problems[0]).items()
            if isinstance(value, torch.Tensor)
        }
        problem = replace(problems[0], **moved)
        child = os.fork()
        if child == 0:
            solve_small(problem)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        steps.append(problem.step)
    want, _ = solve(None, system, rest, 2)
    assert relative(steps[0], want.step) < 5e-6 and torch.equal(*steps)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((5, 7), {}),
        ((5, 7), {"preconditioner": False}),
        ((5, 7), {"step_limit": 0.4}),
        ((5, 7), {"iterations": 30}),
        ((1, 40), {}),
        ((40, 17), {}),
    ],
)
@pytest.mark.parametrize("with_b", [True, False])
def test_reports(
    backend: str,
    shape: tuple[int, int],
    with_b: bool,
    options: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`mats_many` takes this way, in one launch, and reports what plain torch's run does."""
    solved = []
    plain = small_layers.solve
    monkeypatch.setattr(small_layers, "solve", lambda *a: solved.append(1) or plain(*a))
    cases = [case(2, *shape, seed=i, dtype=torch.float32) for i in range(2)]
    layers = [MatsLayer(c.weights, c.a, c.b if with_b else None) for c in cases]
    layers.append(
        MatsLayer(cases[0].weights, cases[0].a[:1] * 2, cases[0].b[:1] * 2 if with_b else None)
    )
    got = mats_many(layers, backend=backend, **options)
    assert solved == [1]
    for x, y in zip(got, mats_many(layers, backend="reference", **options), strict=True):
        assert relative(x.weight, y.weight) < 2e-5
        if options.get("iterations") is None:  # long runs end in rounding, each in its own
            assert (x.report.status, x.report.iterations) == (y.report.status, y.report.iterations)


@pytest.mark.parametrize(
    ("share", "status"),
    [
        (1 / 2, "breakdown"),  # seen before the step went far: M9 keeps it
        (1 / 50, "initialisation"),  # the step lowered the objective below 0: M10 does not
    ],
)
def test_reports_of_layers_that_break_down(backend: str, share: float, status: str) -> None:
    c = case(2, 12, 8)
    values, basis = torch.linalg.eigh(c.b[0])
    values[:2] = -values[-1] * share
    b = [(basis @ torch.diag(values) @ basis.T).float(), torch.zeros(12, 12)]
    layer = MatsLayer([w.float() for w in c.weights], [a.float() for a in c.a], b)
    options = {"iterations": 12, "objective_tolerance": 0.0, "preconditioner": False}
    (got,), (want,) = (mats_many([layer], backend=x, **options) for x in (backend, "reference"))
    assert got.report.status == want.report.status == status
    assert got.report.iterations == want.report.iterations
    assert relative(got.weight, want.weight) < 1e-4


def test_which_layers_are_small() -> None:
    def takes(*shape: int, dtype: torch.dtype = torch.float32, precision: str = "fp32") -> bool:
        return small_layers.takes(torch.empty(shape, dtype=dtype, device="meta"), precision)

    assert takes(1, 64, 64) and takes(1, 1, 256) and takes(64, 256, 256) and takes(64, 65, 1)
    assert not (takes(1, 65, 64) or takes(63, 64, 65) or takes(1, 1, 257) or takes(64, 257, 1))
    assert not takes(1, 8, 8, precision="tf32")
    assert not takes(1, 8, 8, dtype=torch.float64, precision="fp64")


def test_cuda_says_what_its_kernel_does_not_take(emulated_cuda: None) -> None:
    def launch(layers: int, d_out: int, d_in: int, count: int, left: int = 0) -> None:
        none = (0,) * 4
        native.cuda().cg_small(
            layers, d_out, d_in, count, *none, 0, left, 0, 0, 0, 0, False, 0, *cuda.place("cpu")
        )

    beyond = LARGEST + 1
    for shape in ((beyond, 1), (1, beyond), (0, 1), (1, 0)):
        with pytest.raises(ValueError, match=f"{shape[0]} x {shape[1]} are not between 1 x 1 and"):
            launch(1, *shape, 1)
    for layers, count in ((0, 1), (1 << 31, 1), (1, 0), (1, 1 << 23)):
        with pytest.raises(ValueError, match=f"{layers} layers of {count} models"):
            launch(layers, 1, 1, count)
    with pytest.raises(ValueError, match="left is given"):
        launch(1, 1, 1, 1, left=8)


@pytest.mark.parametrize("with_b", [True, False])
@pytest.mark.parametrize("limited", [True, False])
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_run_never_waits_for_the_host(
    name: str, with_b: bool, limited: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One launch, on tensors without values, whose reading is an error."""
    launches: list[object] = []
    if name == "cuda":
        fake = SimpleNamespace(cg_small=lambda *numbers: launches.append(numbers))
        monkeypatch.setattr(native, "cuda", lambda: fake)
        monkeypatch.setattr(cuda, "place", lambda device: (0, 3, 0))
        kernel = solve_small
    else:
        module = pytest.importorskip("pymerge.triton_kernels.mats.cg_small")
        monkeypatch.setattr(module, "launch", lambda kernel, *_, **__: launches.append(kernel))
        kernel = module.solve_small
    system, rest = stack((6, 5), 2, with_b=with_b)
    inverses = Preconditioner(system, resolve(2), 0.01)

    def empty(x: torch.Tensor | None) -> Any:
        return None if x is None else x.to("meta")

    held = (empty(x) for x in (system.a, system.b, system.total_a, system.scale))
    means = empty(system.mean_a), empty(system.mean_b)
    system = System(*held, system.weights, system.products, *means)
    inverses.right, inverses.left = empty(inverses.right), empty(inverses.left)
    limit = torch.empty(2, dtype=torch.float64, device="meta")
    state = small_layers.solve(
        kernel, system, inverses, empty(rest), empty(rest), 0.0, 4,
        limit if limited else None, limit,
    )  # fmt: skip
    assert len(launches) == 1
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(state.converged.any())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_run_in_a_cuda_graph(name: str) -> None:
    """Captured once, replayed on another right-hand side: the bits of the run that is not
    captured.
    """
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    reason = registry.why_not(name)
    if reason is not None:
        pytest.skip(reason)
    kernel = small_kernel("cuda", name)
    assert kernel is not None
    cases = [case(3, 70, 50, seed=i, dtype=torch.float32) for i in range(2)]
    rule = resolve(3)
    system = build(
        [torch.stack(c.a).cuda() for c in cases],
        [torch.stack(c.b).cuda() for c in cases],
        rule,
        torch.float32,
        2,
    )
    inverses = Preconditioner(system, rule, rule.damping)
    rests = [torch.randn(2, 70, 50, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
    held = rests[0].cuda()
    step, r = torch.zeros_like(held), torch.empty_like(held)
    small = torch.zeros(2, dtype=torch.float64, device="cuda")

    def run() -> None:
        step.zero_()
        r.copy_(held)
        small_layers.solve(kernel, system, inverses, step, r, 0.0, 4, None, small)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # the kernel is loaded before the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    held.copy_(rests[1])
    graph.replay()
    replayed = step.clone()
    run()
    assert torch.equal(replayed, step) and bool(step.any())
