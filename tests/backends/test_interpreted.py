"""The Triton backend without a GPU: Triton's interpreter, each part in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

TESTS = Path(__file__).parents[1]
WORKED = " or ".join(f"test_{rule}" for rule in "t1 t2 t3 t4 t5 t6 t8 t9 n1 n2 e1 e2 known".split())
VECTORS = "whole_solve or every_layer"
SMALL = "reports or every_layer"
# The spec suite, what is the kernels' own, gram, and the vector updates and small layers of mats, several
# files to a process, since its start takes as long as a file. What takes a minute is left to
# `-m slow`.
PARTS = [
    (
        ("triton_interpreted.py", "ties/test_ties.py"),
        f"triton_interpreted or triton and ({WORKED})",
    ),
    (
        (
            "ties/test_norms.py",
            "gram/test_gram.py",
            "mats/test_mats_vectors.py",
            "mats/test_mats_small.py",
        ),
        f"triton and (test_norms or test_gram or test_mats_vectors and ({VECTORS}) or {SMALL})",
    ),
    pytest.param(("ties/test_ties.py",), f"triton and not ({WORKED})", marks=pytest.mark.slow),
    pytest.param(
        ("mats/test_mats_vectors.py",),
        f"triton and not (cuda_graph or {VECTORS})",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        ("mats/test_mats_small.py",),
        f"triton and not (cuda_graph or largest or {SMALL})",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(("files", "part"), PARTS)
@pytest.mark.parametrize("chosen", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_interpreted(files, part, chosen):
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:randomly",
            "-p",
            "no:cacheprovider",
            "-m",
            chosen,
            *(str(TESTS / file) for file in files),
            "-k",
            part,
        ],
        cwd=TESTS.parent,
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
        },
        capture_output=True,
        text=True,
    )
    none_is_slow = chosen == "slow" and run.returncode == pytest.ExitCode.NO_TESTS_COLLECTED
    assert run.returncode == 0 or none_is_slow, run.stdout[-8000:] + run.stderr[-4000:]
    assert " passed" in run.stdout or none_is_slow
    assert "skipped" not in run.stdout


def test_the_folder_does_not_import_by_its_own_name():
    run = subprocess.run(
        [sys.executable, "-c", "import triton_kernels"],
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0 and "pymerge.triton_kernels" in run.stderr
