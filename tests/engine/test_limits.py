"""What the system or the user sets too high or too low: threads, memory, values of options. A line,
never a traceback.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from folder_cases import read_result, recipe, write_family
from safetensors.torch import save_file

from pymerge import bench
from pymerge.backends import native
from pymerge.bench.cases import FAMILIES, MERGES
from pymerge.engine.merge import merge_checkpoints


@pytest.mark.parametrize("threads", [1025, 10**11, 10**30])
def test_more_threads_than_there_can_be(tmp_path: Path, threads: int) -> None:
    folders = write_family(tmp_path)
    merge_checkpoints(recipe("ties", folders, density=0.4), tmp_path / "one", threads=1)
    merge_checkpoints(recipe("ties", folders, density=0.4), tmp_path / "many", threads=threads)
    one, many = read_result(tmp_path / "one"), read_result(tmp_path / "many")
    assert all(torch.equal(one[name], many[name]) for name in one)


@pytest.mark.parametrize("threads", [True, 1.0, "2", None])
def test_threads_that_are_no_number(tmp_path: Path, threads: object) -> None:
    with pytest.raises(TypeError, match=r"threads=.* is a .*; pass a whole number"):
        merge_checkpoints({}, tmp_path / "out", threads=threads)  # type: ignore[arg-type]


@pytest.mark.parametrize(("value", "count"), [("9" * 5000, 1024), ("007", 7), ("1", 1)])
def test_threads_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, value: str, count: int
) -> None:
    monkeypatch.setenv("PYMERGE_NUM_THREADS", value)
    assert native.num_threads() == count


@pytest.mark.parametrize("value", ["0", "00", "-1", "two", "1.5", "\u0662", "\u00b2"])
def test_bad_threads_of_the_environment(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("PYMERGE_NUM_THREADS", value)
    with pytest.raises(ValueError, match=r"PYMERGE_NUM_THREADS=.* is not a positive integer"):
        native.num_threads()


BAD = [
    ("--size", "foo"),
    ("--size", ""),
    ("--size", "16M,"),
    ("--size", "-1"),
    ("--size", "0"),
    ("--size", "nan"),
    ("--size", "1e9"),
    ("--size", "9" * 400),
    ("--size", "900G"),
    ("--models", "0"),
    ("--models", "65"),
    ("--models", "2,x"),
    ("--models", "\u00b2"),
    ("--family", "fp64"),
    ("--merge", "slerp"),
    ("--repeats", "-1"),
    ("--repeats", "x"),
    ("--backend", "gpu"),
    ("--backend", "cuda"),
    ("--threads", "-1"),
    ("--threads", "99999999999"),
    ("--official", "/nowhere"),
]


@pytest.mark.parametrize(("option", "value"), BAD)
def test_bench_names_the_option(
    capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main([option, value])
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("Error: ")
    assert option in last


def test_bench_offers_the_families_and_merges_that_there_are() -> None:
    assert bench.FAMILIES == tuple(FAMILIES)
    assert bench.MERGES == tuple(MERGES)


def test_bench_helps(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["-h"]) == 0
    assert "--threads" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["merge", "r.yml", "out", "--out-shard-size", "9" * 400],
        ["merge", "r.yml", "out", "--threads", "-1"],
        ["merge", "r.yml", "out", "--seed", "nan"],
        ["merge", b"\xff", b"\xfe"],
        ["plan", ""],
        ["plan", b"\xff"],
        ["bench", b"\xff"],
        ["bench", "--size", b"\xff"],
        ["stats", "show", b"\xff"],
        ["stats", "m", "d", "--out", "o", "--seed", "9" * 40],
        ["doctor", "--nothing"],
    ],
)
def test_absurd_arguments(tmp_path: Path, arguments: list[str | bytes]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pymerge", *arguments],
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    assert done.returncode in (1, 2), done.stderr
    assert b"rror: " in done.stderr.splitlines()[-1]
    assert b"Traceback" not in done.stderr


LIMITED = """
import resource, sys
from pymerge.backends import native
import pymerge.__main__, pymerge.cli.main, pymerge.cli.terminal, pymerge.engine.merge, pymerge.engine.run, pymerge.recipe.resolve, rich.console, rich.table  # before the limit
native.cpu_level()
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (int(sys.argv.pop(1)) << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
from pymerge.__main__ import main
main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("megabytes", [0, 2, 6, 20, 40, 70, 100, 150])
def test_too_little_memory(tmp_path: Path, megabytes: int) -> None:
    """Wherever it runs out: blocks, scratch, stacks of threads, mappings."""
    for name in ("base", "m1", "m2"):
        (tmp_path / name).mkdir()
        save_file(
            {f"t{i}": torch.randn(1 << 20) for i in range(4)}, tmp_path / name / "model.safetensors"
        )
    config = recipe("ties", [tmp_path / name for name in ("base", "m1", "m2")], density=0.4)
    (tmp_path / "r.yml").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(megabytes), "merge", "r.yml", "out", "-q"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        assert done.returncode == 1, done.stderr
        assert "error: not enough memory" in done.stderr or "no further thread" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / ".out.pymerge-partial").exists()
    else:
        assert megabytes > 2
