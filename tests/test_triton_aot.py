"""What the compilers make of the Triton kernels for GPUs that are not here: no spills, wide loads, nothing contracted."""

from __future__ import annotations

import os
import re

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1",
    reason="TRITON_INTERPRET=1 makes kernels interpreted, not compiled",
)


def compiled(names, targets):
    from pymerge.triton_kernels import aot

    cases = aot.cases()
    return [
        aot.compile_launch(launch, name, target)
        for name in names
        for launch in aot.launches(cases[name])
        for target in targets
    ]


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_no_spills_and_nothing_contracted(target):
    for one in compiled(["fp32 K=2", "fp16 K=4 small"], [target]):
        where = f"{one.kernel} for {one.case} on {target}"
        assert one.spills == 0, f"{where} spills {one.spills} bytes a thread"
        assert 0 < one.registers <= 255 and one.shared <= 48 * 1024, where
        # fma would round once where the spec rounds twice, .ftz flush subnormals, div.full be 2 ulp off.
        assert not re.search(r"\bfma\.|\.ftz|div\.(full|approx)", one.assembly), where
        if one.kernel in ("merge_guessed", "merge_chunks") and one.case == "fp32 K=2":
            assert one.assembly.count("ld.global.v4.b32") >= 3, (
                f"{where}: loads of less than 16 bytes"
            )


def test_what_is_launched():
    """In order, for a large tensor and for a small one."""
    from pymerge.triton_kernels import aot

    cases = aot.cases()
    large = [launch.kernel.__name__ for launch in aot.launches(cases["fp32 K=2"])]
    assert large == [
        *["sample_digits"] * 3, "take_bracket", "merge_guessed", "prove_brackets", "gather_finalists",
        "take_finalist", "mend", *["count_digits"] * 3, "take_threshold", "merge_chunks",
    ]  # fmt: skip
    small = [launch.kernel.__name__ for launch in aot.launches(cases["fp16 K=4 small"])]
    assert small == ["select_small", "merge_chunks"]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_kernel_on_every_target(target):
    from pymerge.triton_kernels import aot

    spilling = [
        (one.kernel, one.case, one.spills) for one in aot.compile_all([target]) if one.spills
    ]
    assert not spilling
