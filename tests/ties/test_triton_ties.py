"""The Triton backend without a GPU: Triton's interpreter, each part in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parents[1]
EVERY_MERGE = "test_every_election_and_merge"
WORKED = " or ".join(f"test_{rule}" for rule in "t1 t2 t3 t4 t5 t6 t8 n1 n2 e1 e2 known".split())
SPECULATION = (
    "guess or mended or collapses or distinct or bracket or records or nan_ends or speculation"
)


@pytest.mark.parametrize(
    ("file", "part"),
    [
        ("ties/test_ties.py", f"triton and ({WORKED})"),
        ("ties/test_ties.py", f"triton and {EVERY_MERGE}"),
        ("ties/test_ties.py", f"triton and not ({WORKED} or {EVERY_MERGE})"),
        ("triton_interpreted.py", SPECULATION),
        ("triton_interpreted.py", f"not ({SPECULATION})"),
    ],
)
def test_interpreted(file, part):
    """The spec suite, then what is the kernels' own."""
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:randomly",
            "-m",
            "not slow",
            str(HERE / file),
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
