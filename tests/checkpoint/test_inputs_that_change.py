"""Inputs that somebody truncates, rewrites, replaces or deletes while they are merged: an error
that names them, and nothing left.
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from file_changes import CHANGES, delete, empty, replace, rewrite, truncate
from folder_cases import recipe, write_family, write_model
from safetensors.torch import save_file
from solve_cases import write_statistics

from pymerge.backends import native
from pymerge.checkpoint import statistics
from pymerge.checkpoint.identity import WatchedFile
from pymerge.checkpoint.memory import Region
from pymerge.engine.merge import merge_checkpoints
from pymerge.errors import CheckpointError, MergeError

ROOT = Path(__file__).parents[2]
LAYERS, ROWS = 12, 1 << 16  # of models that take long enough to be changed at any moment
TURNS = 12

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mappings as Linux has them")


def write_bin(folders: list[Path]) -> None:
    """The same models as PyTorch files, some tensors transposed in them."""
    from safetensors.torch import load_file

    for folder in folders:
        state = load_file(folder / "model.safetensors")
        turned = {n: t.t().contiguous().t() if "q_proj" in n else t for n, t in state.items()}
        torch.save(turned, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()


def left(tmp_path: Path) -> set[str]:
    """What is there beside the inputs."""
    return {path.name for path in tmp_path.iterdir()} - {"base", "m1", "m2", "recipe.yml"}


@pytest.mark.parametrize("at", [1, 4, 9])
@pytest.mark.parametrize("way", ["read", "mmap"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_change_between_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, name: str, way: str, at: int
) -> None:
    """After the last tensor too (9), when everything has been read."""
    monkeypatch.setenv("PYMERGE_IO", way)
    folders = write_family(tmp_path)
    if name.endswith(".bin"):
        write_bin(folders)
    time.sleep(0.02)  # the clock of file times ticks a few milliseconds at a time
    seen = []

    def progress(*_: Any) -> None:
        seen.append(1)
        if len(seen) == at:
            change(folders[1] / name)

    with native.surviving_lost_pages(), pytest.raises(CheckpointError) as caught:
        merge_checkpoints(
            recipe("ties", folders, density=0.4),
            tmp_path / "out",
            out_shard_size=1500,
            progress=progress,
        )
    assert str(folders[1] / name) in str(caught.value)
    assert re.search(CHANGES[change], str(caught.value))
    assert "merge again" in str(caught.value)
    assert not left(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_files_beside_the_weights(tmp_path: Path, name: str) -> None:
    folders = write_family(tmp_path)
    (folders[0] / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    (folders[0] / "tokenizer_config.json").write_text("{}")
    time.sleep(0.02)

    def progress(*_: Any) -> None:
        (folders[0] / name).write_text("[]")

    with pytest.raises(CheckpointError, match=rf"base/{name}: was"):
        merge_checkpoints(recipe("ties", folders), tmp_path / "out", progress=progress)
    assert not left(tmp_path)


def test_deleted_tokenizer_is_not_an_output_error(tmp_path: Path) -> None:
    folders = write_family(tmp_path)
    (folders[0] / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')

    def progress(*_: Any) -> None:
        (folders[0] / "tokenizer.json").unlink(missing_ok=True)

    with pytest.raises(CheckpointError, match=r"tokenizer\.json: was deleted"):
        merge_checkpoints(recipe("ties", folders), tmp_path / "out", progress=progress)
    assert not left(tmp_path)


def test_what_comes_of_a_change_is_not_blamed(tmp_path: Path) -> None:
    """The rewritten half is NaN; that is no fault of the model that was there at first."""
    folders = write_family(tmp_path, dtype=torch.float32)
    time.sleep(0.02)

    def progress(*_: Any) -> None:
        path = folders[1] / "model.safetensors"
        size = path.stat().st_size
        with path.open("r+b") as file:
            file.seek(size // 8 * 4)
            file.write(b"\xff" * (size - size // 8 * 4))

    with pytest.raises(CheckpointError, match="was written to"):
        merge_checkpoints(
            recipe("linear", folders), tmp_path / "out", progress=progress, out_shard_size=1500
        )
    assert not left(tmp_path)


def test_other_files_may_change(tmp_path: Path) -> None:
    """And reading, by others too, changes nothing."""
    folders = write_family(tmp_path)

    def progress(*_: Any) -> None:
        (folders[0] / "notes.txt").write_text("new")
        (folders[1] / "model.safetensors").read_bytes()

    merge_checkpoints(recipe("ties", folders), tmp_path / "out", progress=progress)
    assert (tmp_path / "out").is_dir()


def test_network_file_systems_have_no_inodes_to_compare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"1234")
    for kind, told in (("ext4", True), ("fuse.sshfs", False)):
        monkeypatch.setattr("pymerge.checkpoint.memory._file_system", lambda _, k=kind: k)
        file = WatchedFile(path)
        replace(path)
        if told:
            with pytest.raises(CheckpointError, match="replaced"):
                file.check()
        else:
            file.check()
        path.write_bytes(b"12345")
        with pytest.raises(CheckpointError):
            file.check()
        path.write_bytes(b"1234")


# A merge at full speed, and a change at any moment.


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and two models of 100 MB."""
    root = tmp_path_factory.mktemp("large")
    generator = torch.Generator().manual_seed(0)
    held = torch.randn(ROWS * 16, generator=generator)
    folders = [root / name for name in ("base", "m1", "m2")]
    for k, folder in enumerate(folders):
        folder.mkdir()
        whole = (held + 0.1 * k * held.roll(k)).bfloat16().reshape(ROWS, 16)
        state = {f"layers.{n}.weight": whole.roll(n, 0) for n in range(LAYERS)}
        save_file(state, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
    return folders


API = """
import json, sys
from pymerge import merge_checkpoints
from pymerge.errors import MergeError
config, out = json.loads(sys.argv[1])
print("begin", flush=True)
try:
    merge_checkpoints(config, out, out_shard_size="20MB")
except MergeError as error:
    sys.exit(f"error: {error}")
"""


def start(config: dict[str, Any], tmp_path: Path, program: str) -> subprocess.Popen[str]:
    out = str(tmp_path / "out")
    if program == "command":
        (tmp_path / "recipe.yml").write_text(json.dumps(config))
        code = "print('begin', flush=True); from pymerge.__main__ import main; main()"
        words = ["merge", str(tmp_path / "recipe.yml"), out, "--out-shard-size", "20MB", "-q"]
    else:
        code, words = textwrap.dedent(API), [json.dumps([config, out])]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None and process.stdout.readline() == "begin\n"
    return process


SETTINGS: dict[str, dict[str, Any]] = {"linear": {}, "ties": {"density": 0.3}}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("program", ["command", "python"])
@pytest.mark.parametrize("method", SETTINGS)
def test_change_at_any_moment(
    tmp_path: Path, large: list[Path], method: str, program: str, name: str
) -> None:
    """Either it was before or after the merge, and the result is that of one version, or it is an
    error.
    """
    draw = random.Random(f"{method}{program}{name}")
    kept = tmp_path.with_name(f"{tmp_path.name}-kept")
    shutil.copytree(large[0].parent, kept)
    if name.endswith(".bin"):
        write_bin([kept / folder.name for folder in large])
    shutil.copytree(kept, tmp_path, dirs_exist_ok=True)
    config = recipe(method, [tmp_path / folder.name for folder in large], **SETTINGS[method])
    usual = math.inf
    for _ in range(2):  # the first also waits for what the caches lack
        process = start(config, tmp_path, program)
        began = time.monotonic()
        said = process.communicate()[1]
        assert process.returncode == 0, said
        usual = min(usual, time.monotonic() - began)
        shutil.rmtree(tmp_path / "out")
    errors = 0
    for turn in range(TURNS):
        change = draw.choice([truncate, empty, rewrite, replace, delete])
        victim = tmp_path / draw.choice(["m1", "m2"]) / name
        process = start(config, tmp_path, program)
        timer = threading.Timer(draw.uniform(0.1, 0.9) * usual, change, [victim])
        timer.start()
        _, told = process.communicate(timeout=600)
        timer.join()
        where = f"turn {turn}, {change.__name__}: {process.returncode} {told}"
        assert process.returncode in (0, 1), where
        assert (tmp_path / "out").exists() is (process.returncode == 0), where
        assert left(tmp_path) <= {"out"}, where
        if process.returncode:
            errors += 1
            assert told.startswith("error: ") and str(victim.parent) in told, where
        else:
            shutil.rmtree(tmp_path / "out")
        victim.unlink(missing_ok=True)
        shutil.copyfile(kept / victim.relative_to(tmp_path), victim)
    assert errors
    shutil.rmtree(kept)


# The handler of the command line.


def test_lost_pages_are_zeros_and_told(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\1" * 20000)
    with native.surviving_lost_pages():
        assert native.survives_lost_pages()
        with path.open("rb") as file:
            region = Region.of_input(file.fileno())
            other = Region.of_input(file.fileno())
        before = native.lost_pages()
        os.truncate(path, 100)
        assert not region.lost
        assert bytes(region.view(8000, 10)) == bytes(10)
        assert region.lost and not other.lost
        assert bytes(region.view(0, 101)) == b"\1" * 100 + b"\0"
        assert native.lost_pages() == before + 1
        region.close()
        other.close()
    assert not native.survives_lost_pages()


def test_pages_of_any_mapping_where_that_is_asked_for(tmp_path: Path) -> None:
    """As of weights that transformers maps."""
    page = mmap.PAGESIZE
    path = tmp_path / "file"
    path.write_bytes(b"\1" * 5 * page)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    with native.surviving_lost_pages(), native.surviving_lost_pages(any_mapping=True):
        before = native.lost_pages()
        os.truncate(path, 100)
        mapped[3 * page + 8] = 5
        assert mapped[3 * page - 9 : 3 * page + 9] == bytes(17) + b"\5"
        assert mapped[0:101] == b"\1" * 100 + b"\0"
        assert native.lost_pages() == before + 2
    code = """
import mmap, os, sys
from pymerge.backends import native
with open(sys.argv[1], "wb+") as file:
    file.truncate(9000)
    mapped = mmap.mmap(file.fileno(), 0)
    with native.surviving_lost_pages(any_mapping=True):
        pass
    with native.surviving_lost_pages():
        file.truncate(0)
        mapped[8999]
"""
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGBUS


def test_many_mappings_by_many_threads(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\1" * 9000)
    opened: list[Region] = []

    def some() -> None:
        for turn in range(300):
            with path.open("rb") as file:
                region = Region.of_input(file.fileno())
            if turn % 3:
                opened.append(region)
            else:
                region.close()

    with native.surviving_lost_pages():
        threads = [threading.Thread(target=some) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        os.truncate(path, 0)
        lost = random.Random(0).sample(opened, 700)
        for region in lost:
            assert region.view()[8999] == 0
        assert len(opened) == 1200
        assert [region for region in opened if region.lost] == [r for r in opened if r in lost]
        for region in opened:
            region.close()


# A SIGBUS of another mapping, and one that another process sends.
ELSEWHERE = """
import ctypes, faulthandler, mmap, os, signal, sys, tempfile
from pymerge.backends import native
before, what = sys.argv[1:]
if before == "faulthandler":
    faulthandler.enable()
elif before == "ignore":
    signal.signal(signal.SIGBUS, signal.SIG_IGN)
elif before == "python":
    signal.signal(signal.SIGBUS, lambda *_: os._exit(7))
with native.surviving_lost_pages():
    if what == "sent":
        os.kill(os.getpid(), signal.SIGBUS)
    else:
        with tempfile.TemporaryFile() as file:
            file.truncate(20000)
            other = mmap.mmap(file.fileno(), 20000)
            file.truncate(0)
            other[9000]
print("went on")
"""


def elsewhere(before: str, what: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, before, what],
        capture_output=True, text=True, cwd=ROOT, check=False, timeout=100,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("what", ["fault", "sent"])
@pytest.mark.parametrize("before", ["nothing", "faulthandler"])
def test_another_fault_still_ends_the_process(before: str, what: str) -> None:
    code, out, errors = elsewhere(before, what)
    assert code == -signal.SIGBUS and not out
    assert ("Fatal Python error: Bus error" in errors) is (before == "faulthandler")


def test_handlers_that_were_there_before() -> None:
    assert elsewhere("ignore", "sent")[:2] == (0, "went on\n")
    assert elsewhere("ignore", "fault")[0] == -signal.SIGBUS  # the system does not ignore that
    assert elsewhere("python", "sent")[0] == 7


def test_the_handler_of_before_is_put_back() -> None:
    code = """
import faulthandler, os, signal
from pymerge.backends import native
faulthandler.enable()
for _ in range(3):
    with native.surviving_lost_pages(), native.surviving_lost_pages():
        pass
os.kill(os.getpid(), signal.SIGBUS)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == -signal.SIGBUS and "Bus error" in done.stderr


def test_a_library_installs_no_handler(tmp_path: Path) -> None:
    folders = write_family(tmp_path)
    seen: list[bool] = []
    merge_checkpoints(
        recipe("ties", folders),
        tmp_path / "out",
        progress=lambda *_: seen.append(native.survives_lost_pages()),
    )
    assert seen and not any(seen)
    assert issubclass(CheckpointError, MergeError)


def test_statistics_that_are_replaced_while_they_are_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their counts would be of one file and their sums of another."""
    states = [{"q_proj.weight": torch.randn(4, 4)} for _ in range(2)]
    folders = [write_model(tmp_path / f"m{k}", state) for k, state in enumerate(states)]
    files = [
        write_statistics(tmp_path / f"{k}.safetensors", state, seed=k)
        for k, state in enumerate(states)
    ]
    other = write_statistics(tmp_path / "other.safetensors", states[0], seed=7)
    plain = statistics.read_all

    def read_all(path: Path) -> Any:
        found = plain(path)
        if path == Path(files[0]) and other.exists():
            other.replace(path)
        return found

    monkeypatch.setattr(statistics, "read_all", read_all)
    config = {
        "merge_method": "regmean",
        "dtype": "float32",
        "models": [
            {"model": str(folder), "statistics": str(file)}
            for folder, file in zip(folders, files, strict=True)
        ],
    }
    with pytest.raises(CheckpointError, match="while it was in use"):
        merge_checkpoints(config, tmp_path / "out")


@pytest.mark.parametrize("way", ["mmap", "read"])
def test_a_working_directory_that_changes_is_no_change_of_the_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setenv("PYMERGE_IO", way)
    write_family(tmp_path)
    monkeypatch.chdir(tmp_path)
    config = recipe("ties", [Path("base"), Path("m1"), Path("m2")], density=0.5)
    merge_checkpoints(config, "out", out_shard_size=1500, progress=lambda *_: os.chdir("/"))
    assert (tmp_path / "out/config.json").is_file()


class Failing:
    """A file system of which one of the questions about a path, the n-th, is not answered."""

    def __init__(self, path: Path, at: int, code: int) -> None:
        self.path, self.at, self.code = path, at, code
        self.asked = 0

    def instead_of(self, ask):
        def asked(path, *args, **options):
            if isinstance(path, (str, Path)) and Path(path) == self.path:
                self.asked += 1
                if self.asked == self.at:
                    raise OSError(self.code, os.strerror(self.code), str(path))
            return ask(path, *args, **options)

        return asked


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "tokenizer.json", "notes.txt", "modules.json", ""],
)
def test_a_file_system_that_does_not_answer_loses_no_file(name, code, tmp_path, monkeypatch):
    base, *_ = folders = write_family(tmp_path)
    for other in ("generation_config.json", "notes.txt"):
        (base / other).write_text("{}")
    (base / "modules.json").write_text("[]")
    (base / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    wanted = {path.name for path in base.iterdir()}
    ask_stat, ask_lstat = os.stat, os.lstat
    for at in range(1, 100):
        failing = Failing(base / name, at, code)
        monkeypatch.setattr(os, "stat", failing.instead_of(ask_stat))
        monkeypatch.setattr(os, "lstat", failing.instead_of(ask_lstat))
        out = tmp_path / "out"
        try:
            summary = merge_checkpoints(recipe("ties", folders), out, overwrite=True)
        except (MergeError, OSError) as error:
            assert os.strerror(code) in str(error) and str(base / name) in str(error)
            shutil.rmtree(out, ignore_errors=True)
        else:
            lost = wanted - {path.name for path in out.iterdir()}
            told = "\n".join(summary.notes)
            assert all(f"{each} is not copied (cannot be" in told for each in lost), (
                at,
                lost,
                told,
            )
        if failing.asked < at:
            break
    assert at > 1
