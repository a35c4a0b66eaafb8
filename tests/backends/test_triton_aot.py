"""What the compilers make of the Triton kernels for GPUs that are not here: no spills, wide loads,
nothing contracted.
"""

from __future__ import annotations

import os
import re

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1",
    reason="TRITON_INTERPRET=1 makes kernels interpreted, not compiled",
)


# The passes over whole inputs, and how many vectors they read at a place for so many models: four
# models and the base under way at once.
WHOLE = {
    "merge_sampled": lambda count: min(count, 4) + 1,
    "merge_chunks": lambda count: min(count, 4) + 1,
    "count_digits": lambda count: 2,
}


def compiled(names, targets):
    from pymerge.triton_kernels import aot

    cases = aot.cases()
    return [
        aot.compile_launch(launch, name, target)
        for name in names
        for launch in aot.launches(cases[name])
        for target in targets
    ]


@pytest.mark.parametrize("target", [pytest.param("sm_80", marks=pytest.mark.slow), "sm_90"])
def test_no_spills_and_nothing_contracted(target):
    for one in compiled(["fp32 K=2", "fp16 K=4 small"], [target]):
        where = f"{one.kernel} for {one.case} on {target}"
        assert one.spills == 0, f"{where} spills {one.spills} bytes a thread"
        assert 0 < one.registers <= 255 and one.shared <= 48 * 1024, where
        # fma would round once where the spec rounds twice, .ftz flush subnormals, div.full be 2 ulp
        # off.
        assert not re.search(r"\bfma\.|\.ftz|div\.(full|approx)", one.assembly), where
        if one.case == "fp32 K=2" and one.kernel in WHOLE:
            assert one.assembly.count("ld.global.v4.b32") >= WHOLE[one.kernel](2), (
                f"{where}: loads of less than 16 bytes"
            )
            if one.kernel != "count_digits":
                assert one.assembly.count("st.global.v4.b32") >= 1, f"{where}: split stores"


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("count", "weight", "narrow"),
    [(1, 1.0, ()), (2, 0.5, ()), (8, 1.0, ("merge_sampled",)), (8, 0.5, ("merge_sampled", "merge_chunks"))],
)  # fmt: skip
def test_models_of_16_bits_are_read_16_bytes_at_a_time(count, weight, narrow, base):
    """But for two passes that would spill registers: with records of more than four models, and
    with eight models or more and weights.
    """
    from pymerge.rules.ties import resolve_options
    from pymerge.triton_kernels import aot, ties

    n = 1 << 26
    tensor, based = torch.empty(n, dtype=torch.bfloat16), torch.empty(n, dtype=base)
    rule = resolve_options(count, density=0.01, weights=weight).rule(n)
    seen = set()
    for launch in aot.launches(lambda: ties.ties([tensor] * count, based, rule, tensor)):
        name = launch.kernel.__name__
        if name not in WHOLE or name in seen:  # of count_digits the first level
            continue
        seen.add(name)
        one = aot.compile_launch(launch, "", "sm_90")
        assert one.spills == 0, name
        assert ("ld.global.v2.b32" in one.assembly) == (name in narrow), name
        assert name in narrow or one.assembly.count("ld.global.v4.b32") >= WHOLE[name](count), name
    assert seen == set(WHOLE)


def test_what_is_launched():
    """In order, for a large tensor and for a small one."""
    from pymerge.triton_kernels import aot

    cases = aot.cases()
    large = [launch.kernel.__name__ for launch in aot.launches(cases["fp32 K=2"])]
    assert large == [
        *["sample_digits"] * 3, "take_bracket", "merge_sampled", "prove_brackets", "gather_finalists",
        "take_finalist", "fix_up", *["count_digits"] * 3, "take_threshold", "merge_chunks",
    ]  # fmt: skip
    small = [launch.kernel.__name__ for launch in aot.launches(cases["fp16 K=4 small"])]
    assert small == ["select_small", "merge_chunks"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_scratch_memory_is_under_5_percent_of_an_input(monkeypatch, dtype, count):
    from pymerge.rules.ties import resolve_options
    from pymerge.triton_kernels.ties import _descriptors, _launch_plan

    monkeypatch.setattr(_launch_plan, "_programs", lambda device, chunks: min(chunks, 4 * 132))
    guessed = []
    for n in (1 << 22, (1 << 22) + 12345, 1 << 23, 1 << 24, 1 << 26, 1 << 30):
        memory = torch.zeros(1, dtype=dtype).expand(n)  # never looked at
        rule = resolve_options(count, density=0.2).rule(n)
        job = _descriptors.Job((memory,) * count, memory, memory, rule, 32)
        kind = _launch_plan.Kind.of(job)
        sample = _launch_plan._sample(kind, job)
        words = 3 * 2048 * count
        if sample is not None:
            guessed.append(n)
            words = sum(_launch_plan._areas(kind, n, dtype.itemsize)) + sample[1]
        counts = 8 * 64 * (2 * count + 3)
        assert 4 * words + counts < 0.05 * n * dtype.itemsize, n
    assert 1 << 26 in guessed and (count > 2 or 1 << 23 in guessed)


def test_what_a_capture_launches_is_loaded_before(monkeypatch):
    """A CUDA graph's capture cannot load a kernel, and the one that carries tables as arguments
    runs nowhere else.
    """
    from pymerge.triton_kernels import _launch
    from pymerge.triton_kernels.ties import _descriptors

    tensor = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda words, dtype, **_: tensor(words, dtype=dtype))
    _descriptors._load_poke.cache_clear()
    made = []
    for capturing in (False, False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda now=capturing: now)
        with _launch.recording(lambda kernel, *_: made.append(kernel.__name__)):
            _descriptors.upload([1, 2], torch.device("meta"))
        assert made == ["_poke", "_poke"] if capturing else made == ["_poke"]
    _descriptors._load_poke.cache_clear()


@pytest.mark.parametrize(
    "target",
    [
        pytest.param("sm_80", marks=pytest.mark.slow),
        "sm_90",
        pytest.param("sm_100", marks=pytest.mark.slow),
        pytest.param("gfx942", marks=pytest.mark.slow),
    ],
)
def test_every_kernel_on_every_target(target):
    from pymerge.triton_kernels import aot

    spilling = [
        (one.kernel, one.case, one.spills) for one in aot.compile_all([target]) if one.spills
    ]
    assert not spilling
