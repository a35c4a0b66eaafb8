"""What the system or the user sets too high or too low: threads, memory, values of options. A line,
never a traceback.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from folder_cases import read_result, recipe, write_family
from safetensors.torch import save_file

import pymerge
from pymerge import bench
from pymerge.backends import native
from pymerge.bench.cases import FAMILIES, MERGES
from pymerge.bench.gram import PER
from pymerge.engine.merge import merge_checkpoints, plan_checkpoints
from pymerge.errors import OutputError, ResourceError


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


@pytest.mark.parametrize(
    "content",
    [None, b"def f(:", b"\0", b"\xff", b"(" * 1000, b"-" * 10**6 + b"1", b"def f(): pass"],
)
def test_an_official_file_that_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    """Told before anything is timed; a pipe is not waited for."""
    path = tmp_path / "merge_utils.py"
    os.mkfifo(path) if content is None else path.write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        bench.main(["--size", "1K", "--models", "2", "--official", str(path)])
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert not shown.out
    last = shown.err.splitlines()[-1]
    assert "--official" in last
    assert last.endswith("pass the repository's merge_utils.py")


def test_bench_offers_the_families_and_merges_that_there_are() -> None:
    assert bench.FAMILIES == tuple(FAMILIES)
    assert bench.MERGES == (*MERGES, *PER)


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


@pytest.mark.parametrize("progress", [5, "a bar", True])
def test_progress_that_cannot_be_called_is_told_before_any_work(
    tmp_path: Path, progress: Any
) -> None:
    folders = write_family(tmp_path)
    with pytest.raises(TypeError, match=r"progress=.*pass a function of \(bytes"):
        merge_checkpoints(recipe("linear", folders), tmp_path / "out", progress=progress)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "m1", "m2"]


@pytest.mark.parametrize("left", range(7))
@pytest.mark.parametrize("way", ["mmap", "read"])
def test_no_further_file_to_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int, way: str
) -> None:
    """The system's limit is told as such, and not as the fault of some path."""
    monkeypatch.setenv("PYMERGE_IO", way)
    config, out = recipe("ties", write_family(tmp_path), density=0.4), tmp_path / "out"
    merge_checkpoints(config, tmp_path / "first")  # with all modules
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    next_one = os.open(os.devnull, os.O_RDONLY)
    os.close(next_one)
    before = sorted(Path("/dev/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (next_one + left, limits[1]))
    try:
        merge_checkpoints(config, out)
    except ResourceError as error:
        assert "opens no further file" in str(error) and "ulimit -n" in str(error)
        done = False
    else:
        done = True
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert sorted(Path("/dev/fd").iterdir()) == before  # none is left open
    assert done if left == 6 else left or not done
    assert out.exists() is done
    merge_checkpoints(config, out, overwrite=True)  # nothing is in the way
    assert not out.with_name(".out.pymerge-partial").exists()


def test_merges_in_threads_leave_the_filters_of_warnings_alone(tmp_path: Path) -> None:
    """Both are the process's: put back by one merge while another one goes on, they would be what
    that one had set, for ever.
    """
    config = recipe("ties", write_family(tmp_path), density=0.4)
    seen: list[bool] = []
    before = list(warnings.filters), warnings.showwarning

    def plan() -> None:
        for _ in range(5):
            plan_checkpoints(config)
            seen.append((list(warnings.filters), warnings.showwarning) == before)

    threads = [threading.Thread(target=plan) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 20 and all(seen)
    for path in (Path(pymerge.__file__).parent).rglob("*.py"):
        if path.name != "main.py":  # of the command line, whose process is its own
            assert "catch_warnings" not in path.read_text(), path


def test_a_umask_that_takes_the_hidden_folder_from_its_maker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = write_family(tmp_path)
    known = os.access

    def access(path: Any, mode: int, **options: Any) -> bool:  # as for anybody but root
        return not str(path).endswith("-partial") and known(path, mode, **options)

    monkeypatch.setattr(os, "access", access)
    with pytest.raises(OutputError, match=r"a new folder may not be written to.*umask"):
        merge_checkpoints(recipe("linear", folders), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "m1", "m2"]
