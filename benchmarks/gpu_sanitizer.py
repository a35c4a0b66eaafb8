"""The part of gpu_check.py that runs the CUDA kernels under compute-sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gpu_correctness
import gpu_mats
import torch
from gpu_cases import draw, plain

LAYERS = [
    (3, 2, 40),
    (2, 20, 70),
    (1, 130, 9),
]  # small layers, of several tiles and of less than one
GRACE = 10  # seconds that a run under compute-sanitizer may take beyond its share
WATCHED = ("--kernel-name=kns=pymerge", "--report-api-errors=no")


def sanitizer(seconds: float) -> dict[str, Any]:
    """memcheck and racecheck over a small run of the CUDA kernels, where compute-sanitizer
    works.
    """
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if tool is None:
        return {"failures": [], "summary": "compute-sanitizer is not installed"}
    failures, summary = [], {}
    script = Path(__file__).with_name("gpu_check.py")
    for check in ("memcheck", "racecheck"):
        # Of this package's kernels alone: torch's are many, and it asks the driver for much that
        # may not be there.
        command = [tool, f"--tool={check}", "--error-exitcode=9", *WATCHED, sys.executable]
        command += [str(script), "--part", "sanitized", "--seconds", f"{seconds / 4:.0f}"]
        # Without torch's caching every tensor is an allocation of its own, whose end memcheck
        # knows.
        env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        # To a file: what the tool has started may outlive it, and would hold a pipe open.
        with tempfile.TemporaryFile() as log:
            try:
                done = subprocess.run(
                    command, stdout=log, stderr=log, timeout=seconds / 2 + GRACE, env=env
                )
            except subprocess.TimeoutExpired:
                summary[check] = "did not end in time"
                continue
            log.seek(0)
            text = log.read().decode(errors="replace")
        found = "Target application returned an error" in text or "ERROR SUMMARY" in text
        if "Device not supported" in text or (done.returncode not in (0, 9) and not found):
            summary[check] = f"does not work here: {text[-200:].strip()}"
        elif done.returncode == 0:
            summary[check] = "clean"
        else:
            summary[check] = "errors"
            failures.append(f"{check}: {text[-3000:]}")
    return {"failures": failures, "summary": summary}


def sanitized(seconds: float) -> dict[str, Any]:
    """The run that is watched: small tensors through every kernel, and one that is guessed; small
    layers of `mats`.
    """
    from pymerge.backends import cuda
    from pymerge.backends.cg.cuda import solve_small

    end = time.monotonic() + seconds
    stacks = [gpu_mats.Stack(shape, torch.device(gpu_correctness.DEVICE)) for shape in LAYERS]
    failures = [wrong for stack in stacks if (wrong := stack.wrong(solve_small))]
    case = plain(gpu_correctness.GUESSED[1], 2, torch.bfloat16, density=0.2)
    gpu_correctness.compare("cuda", cuda, case, failures)
    case = plain(40_003, 3, torch.float32, density=0.2, rescale="l2", zero_sign="majority")
    gpu_correctness.compare("cuda", cuda, case, failures)
    seed = 0
    while time.monotonic() < end:
        gpu_correctness.compare(
            "cuda", cuda, draw(seed, [777, 5003, 40_001], [1, 2, 4, 9]), failures
        )
        seed += 1
    return {"failures": failures, "summary": {"cases": seed + 2}}
