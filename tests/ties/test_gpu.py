"""`ties` and `select` on a GPU, beside the spec suite: drawn cases, the largest tensors, graphs,
streams, many tensors, memory. Where there is none, the emulated CUDA kernels stand in for what needs
no device.
"""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu_cases import adversarial, differences, draw, fixed_plans, plain
from ties_cases import same_bits

from pymerge.backends import cpu, cuda, native, registry
from pymerge.reference import ties as reference
from pymerge.rules.ties import resolve_options

SMALL = [0, 1, 2, 3, 5, 100, 777, 4096, 5003, 16_385, 32_769, 70_001]
GUESSED = [1 << 20, (1 << 20) + 7, (1 << 21) + 4099]


OPS = ("ties", "ties_many", "select")


@pytest.fixture
def gpu(on_gpu: str) -> Any:
    """The functions of a backend, and where its tensors are."""
    found = {op: registry.load(op, on_gpu) for op in OPS}
    return SimpleNamespace(name=on_gpu, device="cuda", **found)


@pytest.fixture
def kernels(
    on_gpu_or_emulated: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """Those of the GPU, or emulated ones on the host, which take smaller tensors."""
    name, device = on_gpu_or_emulated, "cuda"
    if name == "emulated":
        emulated = request.getfixturevalue("emulated")
        monkeypatch.setattr(native, "cuda", lambda: emulated.cuda)
        monkeypatch.setattr(cuda, "place", lambda device: (0, 3, 0))
        name, device = "cuda", "cpu"
    found = {op: registry.load(op, name) for op in OPS}
    return SimpleNamespace(name=on_gpu_or_emulated, device=device, **found)


def same(run: Any, case: Any) -> None:
    wrong, _ = differences(case, run.ties, run.device)
    assert not wrong, (wrong, case.about, case.options)


@pytest.mark.parametrize("part", range(16))
def test_any_option_on_any_tensor(gpu: Any, part: int) -> None:
    counts = [1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 33, 64]
    for seed in range(20 * part, 20 * part + 20):
        same(gpu, draw(seed, SMALL, counts))
    for seed in range(5000 + 3 * part, 5003 + 3 * part):
        same(gpu, draw(seed, GUESSED, [1, 2, 4, 8]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 8])
def test_the_common_case(gpu: Any, count: int, dtype: torch.dtype) -> None:
    if gpu.name == "triton" and count not in (2, 8):
        pytest.skip("each number of models takes seconds to compile")
    same(gpu, plain(GUESSED[1], count, dtype, density=0.2))


@pytest.mark.parametrize("number", range(len(fixed_plans())))
def test_large_tensors(gpu: Any, number: int) -> None:
    """Adversarial ones, up to 2^28 elements, against the CPU's kernels, twice."""
    kind, n, count, dtype = fixed_plans()[number]
    if 8 * n * (count + 4) > torch.cuda.mem_get_info()[0]:
        pytest.skip("more memory than is free")
    models, base = adversarial(kind, n, count, dtype, number, gpu.device)
    compare_with_the_cpu(gpu, models, base)


@pytest.mark.parametrize("kind", ["all equal", "rows", "ulps"])
def test_adversarial_tensors(kernels: Any, kind: str) -> None:
    models, base = adversarial(kind, 20_011, 3, torch.bfloat16, 1, kernels.device)
    compare_with_the_cpu(kernels, models, base)


def compare_with_the_cpu(run: Any, models: Any, base: torch.Tensor) -> None:
    rule = resolve_options(len(models), density=0.2).rule(base.numel())
    want = torch.empty(base.shape, dtype=base.dtype)
    wanted = cpu.ties([m.cpu() for m in models], base.cpu(), rule, want)
    for _ in range(2):
        out = torch.full_like(base, math.nan)
        stats = run.ties(models, base, rule, out).resolve()
        assert same_bits(out.cpu(), want) and repr(stats) == repr(wanted)


def test_a_graph_replays_on_other_data(gpu: Any) -> None:
    n, count = (1 << 20) + 64, 3
    rule = resolve_options(count, density=0.2).rule(n)
    first, second = (
        adversarial("gaussian", n, count, torch.bfloat16, seed, gpu.device) for seed in (1, 2)
    )
    models, base = [m.clone() for m in first[0]], first[1].clone()
    out = torch.empty_like(base)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        gpu.ties(models, base, rule, out)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pending = gpu.ties(models, base, rule, out)
    for data in (first, second, first):
        for into, new in zip([*models, base], [*data[0], data[1]], strict=True):
            into.copy_(new)
        out.fill_(math.nan)
        graph.replay()
        want = torch.empty_like(out)
        wanted = reference.ties(data[0], data[1], rule, want)
        assert same_bits(out, want)
    assert pending.resolve() == wanted  # the counts of the last replay, read for the first time


def test_two_streams_at_once(gpu: Any) -> None:
    """Kernels follow the caller's stream; counts are read on another one than theirs."""
    n = (1 << 22) + 3
    streams = [torch.cuda.Stream() for _ in range(2)]
    data = [adversarial("gaussian", n, 2, torch.float32, seed, gpu.device) for seed in range(2)]
    rule = resolve_options(2, density=0.3).rule(n)
    outs = [torch.full((n,), math.nan, device=gpu.device) for _ in range(2)]
    torch.cuda.synchronize()
    pending = []
    for stream, (models, base), out in zip(streams, data, outs, strict=True):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            pending.append([gpu.ties(models, base, rule, out) for _ in range(3)][-1])
    counts = [each.resolve() for each in pending]
    torch.cuda.synchronize()
    for (models, base), out, stats in zip(data, outs, counts, strict=True):
        want = torch.empty_like(out)
        assert stats == reference.ties(models, base, rule, want)
        assert same_bits(out, want)


def test_many_tensors_in_a_call(kernels: Any) -> None:
    jobs, wanted = [], []
    for j in range(300 if kernels.name != "emulated" else 40):
        n = 1 + 977 * j % (20_000 if kernels.name != "emulated" else 3000)
        models, base = adversarial("gaussian", n, 4, torch.bfloat16, j, kernels.device)
        rule = resolve_options(4, density=0.2).rule(n, str(j))
        jobs.append((models, base, rule, torch.full_like(base, math.nan)))
        want = torch.empty_like(base)
        wanted.append((want, reference.ties(models, base, rule, want)))
    stats = kernels.ties_many(jobs)
    for (_, _, _, out), one, (want, counts) in zip(jobs, stats, wanted, strict=True):
        assert same_bits(out, want) and repr(one.resolve()) == repr(counts)


def test_select_over_segments(kernels: Any) -> None:
    n = 3_000_001 if kernels.name != "emulated" else 30_001
    models, base = adversarial("heavy tail", n, 3, torch.float32, 5, kernels.device)
    cuts = [0, 1, 700, 2 * n // 3, n]
    segments = [([m[a:b] for m in models], base[a:b]) for a, b in itertools.pairwise(cuts)]
    ranks = [n // 5, 1, n - 2]
    got = [float(x) for x in kernels.select(segments, ranks)]
    assert got == list(reference.select([(models, base)], ranks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [2, 4, 8])
def test_scratch_memory_is_under_five_percent_of_an_input(
    gpu: Any, count: int, dtype: torch.dtype
) -> None:
    n = 1 << 26
    models = [torch.zeros(n, dtype=dtype, device=gpu.device) for _ in range(count)]
    out, rule = torch.empty_like(models[0]), resolve_options(count).rule(n)
    gpu.ties(models, None, rule, out).resolve()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gpu.ties(models, None, rule, out).resolve()
    assert torch.cuda.max_memory_allocated() - before < 0.05 * out.nbytes


def test_thresholds_over_two_devices_are_refused(gpu: Any) -> None:
    here = [torch.ones(5, device=gpu.device)]
    with pytest.raises(ValueError, match="the tensors are on cpu and cuda:0"):
        gpu.select([(here, None), ([torch.ones(5)], None)], [1])
