"""The Triton backend without a GPU: Triton's interpreter, each part in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
SPECULATION = (
    "guess or mended or collapses or distinct or bracket or records or nan_ends or speculation"
)


@pytest.mark.parametrize(
    "part",
    [
        "test_options",
        "distributions",
        SPECULATION,
        f"not (test_options or distributions or {SPECULATION})",
    ],
)
def test_interpreted(part):
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:randomly",
            str(HERE / "triton_interpreted.py"),
            "-k",
            part,
        ],
        cwd=HERE.parent,
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
        },
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-4000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout


def test_the_folder_does_not_import_by_its_own_name():
    run = subprocess.run(
        [sys.executable, "-c", "import triton_kernels"],
        cwd=HERE.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0 and "pymerge.triton_kernels" in run.stderr
