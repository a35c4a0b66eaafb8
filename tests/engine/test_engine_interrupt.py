"""A merge that is killed, interrupted or run twice: nothing half-made gets the name, and the next
run goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from folder_cases import assert_same, expected, family, read_result, recipe, write_family

from pymerge.engine.merge import merge_checkpoints
from pymerge.errors import OutputError

SHARD = 1500

RUN = """
import json, os, signal, sys, time
from pymerge.engine.merge import merge_checkpoints

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell may have it ignored
config, out, at, what = json.loads(sys.argv[1])
seen = []

def progress(done, total, name):
    seen.append(name)
    if len(seen) == at:
        if what == "wait":
            print("waiting", flush=True)
            time.sleep(60)
        os.kill(os.getpid(), getattr(signal, what))

merge_checkpoints(config, out, out_shard_size=1500, progress=progress)
"""


def start(config: Any, out: Path, at: int, what: str) -> subprocess.Popen[str]:
    arguments = json.dumps([config, str(out), at, what])
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(RUN), arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def partial(out: Path) -> Path:
    return out.with_name(f".{out.name}.pymerge-partial")


@pytest.mark.parametrize("what", ["SIGKILL", "SIGTERM", "SIGINT"])
@pytest.mark.parametrize("resume", [True, False])
def test_next_run_goes_on_or_starts_clean(tmp_path: Path, what: str, resume: bool) -> None:
    folders = write_family(tmp_path, dtype=torch.float32)
    config, out = recipe("ties", folders, density=0.4), tmp_path / "out"
    process = start(config, out, 6, what)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == (1 if what == "SIGINT" else -getattr(signal, what)) or (
        what == "SIGINT" and process.returncode == -signal.SIGINT
    ), errors
    assert not out.exists()
    finished = json.loads((partial(out) / "pymerge_manifest.json").read_text())["outputs"]
    assert finished
    stamps = {file: (partial(out) / file).stat().st_mtime_ns for file in finished}
    if what == "SIGINT":
        assert {p.name for p in partial(out).iterdir()} == {
            *finished,
            "pymerge_manifest.json",
            ".lock",
        }

    seen: list[tuple[int, int, str]] = []
    summary = merge_checkpoints(
        config, out, out_shard_size=SHARD, resume=resume, progress=lambda *a: seen.append(a)
    )
    assert summary.resumed == (len(finished) if resume else 0)
    for file, stamp in stamps.items():
        assert ((out / file).stat().st_mtime_ns == stamp) is resume
    assert seen[-1][0] == seen[-1][1]
    assert_same(read_result(out), expected(config, family(dtype=torch.float32)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "m1", "m2", "out"]

    clean = merge_checkpoints(config, tmp_path / "clean", out_shard_size=SHARD)
    assert clean.methods == summary.methods
    for path in (tmp_path / "clean").iterdir():
        if path.name != "README.md":  # it has the folder's name as its title
            assert path.read_bytes() == (out / path.name).read_bytes(), path.name


def interrupted(tmp_path: Path) -> tuple[list[Path], Any, Path]:
    folders = write_family(tmp_path, dtype=torch.float32)
    config, out = recipe("ties", folders, density=0.4), tmp_path / "out"
    start(config, out, 6, "SIGKILL").communicate(timeout=600)
    return folders, config, out


def test_damaged_files_are_made_again(tmp_path: Path) -> None:
    _, config, out = interrupted(tmp_path)
    finished = json.loads((partial(out) / "pymerge_manifest.json").read_text())["outputs"]
    victim = partial(out) / next(iter(finished))
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    summary = merge_checkpoints(config, out, out_shard_size=SHARD, resume=True)
    assert summary.resumed == len(finished) - 1
    assert any(f"{victim.name} of the interrupted merge was damaged" in n for n in summary.notes)
    assert_same(read_result(out), expected(config, family(dtype=torch.float32)))


CHANGES = {
    "recipe": r"the recipe had 'density: 0.4' and now has 'density: 0.5'",
    "shard size": "out_shard_size was 1500 bytes and is 1050 bytes",
    "input": "files of m1 changed since",
    "model": "m3 was not among its models",
    "seed": "seed was 0 and is 1",
    "non-finite": "allow_non_finite was False and is True",
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_merge_is_not_resumed(tmp_path: Path, change: str) -> None:
    """It says what differs and loses nothing; without resume it starts anew."""
    folders, config, out = interrupted(tmp_path)
    kept = {p.name: p.read_bytes() for p in partial(out).iterdir()}
    options: dict[str, Any] = {"out_shard_size": SHARD}
    if change == "recipe":
        config["parameters"]["density"] = 0.5
    elif change == "shard size":
        options["out_shard_size"] = 1050
    elif change == "input":
        os.utime(folders[1] / "model.safetensors")
    elif change == "model":
        folders[2].rename(tmp_path / "m3")
        config["models"][1]["model"] = str(tmp_path / "m3")
    elif change == "seed":
        options["seed"] = 1
    else:
        options["allow_non_finite"] = True
    with pytest.raises(OutputError, match=CHANGES[change]) as caught:
        merge_checkpoints(config, out, resume=True, **options)
    assert "start anew without resume=True" in str(caught.value)
    assert {p.name: p.read_bytes() for p in partial(out).iterdir()} == kept
    summary = merge_checkpoints(config, out, **options)
    assert summary.resumed == 0
    seed = options.get("seed", 0)
    assert_same(read_result(out), expected(config, family(dtype=torch.float32), seed=seed))


def test_a_refused_resume_can_still_be_resumed(tmp_path: Path) -> None:
    _, config, out = interrupted(tmp_path)
    with pytest.raises(OutputError, match="was another one"):
        merge_checkpoints(config, out, resume=True, seed=1, out_shard_size=SHARD)
    assert merge_checkpoints(config, out, resume=True, out_shard_size=SHARD).resumed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not readable JSON"),
        ("[]", "is not a JSON object"),
        ("[" * 100_000, "is not readable JSON"),
        ('{"outputs": 3}', "is of format None"),
        (
            '{"format": 2, "pymerge": "9.9"}',
            "is of format 2, by pymerge '9.9'; this release reads",
        ),
        ('{"format": 1, "outputs": {"x": 1}}', r"is damaged \(pymerge: Field required"),
    ],
)
def test_resume_from_a_damaged_manifest(tmp_path: Path, content: str, message: str) -> None:
    _, config, out = interrupted(tmp_path)
    (partial(out) / "pymerge_manifest.json").write_text(content)
    kept = {p.name: p.read_bytes() for p in partial(out).iterdir()}
    with pytest.raises(OutputError, match=message) as caught:
        merge_checkpoints(config, out, resume=True, out_shard_size=SHARD)
    assert "start anew without resume=True" in str(caught.value)
    assert {p.name: p.read_bytes() for p in partial(out).iterdir()} == kept
    assert merge_checkpoints(config, out, out_shard_size=SHARD).resumed == 0


def test_resume_without_anything_to_resume(tmp_path: Path) -> None:
    folders = write_family(tmp_path)
    summary = merge_checkpoints(recipe("linear", folders), tmp_path / "out", resume=True)
    assert summary.resumed == 0
    (note,) = summary.notes
    assert note == (
        f"there was nothing to resume; the merge into {tmp_path / 'out'} was done from the beginning"
    )


def test_two_at_once(tmp_path: Path) -> None:
    folders = write_family(tmp_path)
    config, out = recipe("linear", folders), tmp_path / "out"
    process = start(config, out, 3, "wait")
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(OutputError, match="another merge is writing"):
                merge_checkpoints(config, out, **options)
        assert partial(out).is_dir()
    finally:
        process.kill()
        process.communicate()
    merge_checkpoints(config, out)


def test_interrupt_before_the_first_file_leaves_nothing(tmp_path: Path) -> None:
    folders = write_family(tmp_path)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_checkpoints(recipe("linear", folders), tmp_path / "out", progress=stop)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "m1", "m2"]


def test_old_model_survives_a_failed_overwrite(tmp_path: Path) -> None:
    folders = write_family(tmp_path)
    out = tmp_path / "out"
    merge_checkpoints(recipe("linear", folders), out)
    before = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.iterdir()}

    def stop(*_: Any) -> None:
        raise RuntimeError("a bug in somebody's progress bar")

    with pytest.raises(RuntimeError):
        merge_checkpoints(recipe("ties", folders, density=0.5), out, overwrite=True, progress=stop)
    assert {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "m1", "m2", "out"]
