"""Interrupts at any moment and several at once: no crash, no thread left, and a folder that is whole, can be resumed or is not there."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from folder_cases import assert_same, expected, family, read_result, recipe, write_family

from pymerge.engine import merge as merging
from pymerge.engine.merge import merge_checkpoints, plan_checkpoints
from pymerge.errors import ResourceError
from pymerge.interrupt import Uninterrupted, check, on_calling_thread

ROUNDS = 40

STORM = """
import ctypes, hashlib, json, os, pathlib, random, signal, sys, threading, time
import torch
from safetensors.torch import save_file
from pymerge.engine.merge import merge_checkpoints

how, rounds, folder = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
for i in range(2):
    (folder / f"m{i}").mkdir()
    save_file({f"t{j}": torch.full((1 << 18,), float(i)) for j in range(12)}, folder / f"m{i}/model.safetensors")
config = {"merge_method": "linear", "dtype": "float32",
          "models": [{"model": str(folder / f"m{i}"), "parameters": {"weight": 1}} for i in (0, 1)]}
out, partial = folder / "out", folder / ".out.pymerge-partial"

def merge(**options):
    merge_checkpoints(config, out, out_shard_size="3MB", threads=1, **options)

def hashes():
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.glob("*.safetensors")}

def remove():
    for path in (out, partial):
        for file in path.iterdir() if path.is_dir() else ():
            file.unlink()
        path.is_dir() and path.rmdir()

merge()
remove()
started = time.perf_counter()
merge()
whole, want = time.perf_counter() - started, hashes()
remove()
chance = random.Random(0)
main = threading.main_thread().ident

armed = False

def handler(number, frame):
    if armed:
        raise KeyboardInterrupt

def raised_in_main(error):
    # A thread that is being started still has the identity of the one that starts it, and would get the exception.
    if not any(t.name == "pymerge-merge" and t.ident for t in threading.enumerate()):
        return
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(main), ctypes.py_object(error))

signal.signal(signal.SIGALRM, handler)
signal.signal(signal.SIGINT, handler)

def start(delay):
    global armed
    armed = True
    if how == "once":
        signal.setitimer(signal.ITIMER_REAL, delay)
    elif how == "again and again":
        signal.setitimer(signal.ITIMER_REAL, delay, chance.uniform(5e-5, 5e-3))
    else:
        timer = threading.Timer(delay, raised_in_main, [KeyboardInterrupt])
        timer.start()
        return timer

def stop():
    global armed
    while True:
        try:
            armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            return
        except KeyboardInterrupt:
            pass

def one_round():
    timer = None
    try:
        timer = start(chance.uniform(0.02, 1.1) * whole)
        try:
            merge()
        finally:
            stop()
            if timer is not None:
                timer.cancel()
                timer.join()
    except KeyboardInterrupt:
        return True
    return False

interrupted = resumed = 0
for number in range(rounds):
    try:
        interrupted += one_round()
    except KeyboardInterrupt:  # where it was just being stopped
        interrupted += 1
    while armed:
        try:
            stop()
        except KeyboardInterrupt:
            pass
    assert signal.getsignal(signal.SIGALRM) is handler, number
    for thread in threading.enumerate():
        if thread.name.startswith("pymerge"):
            thread.join(1)  # two exceptions within microseconds may end the waiting before the work
            assert how == "from another thread" and not thread.is_alive(), (number, thread.name)
    if partial.exists():
        assert not out.exists()
        finished = json.loads((partial / "pymerge_manifest.json").read_text())["outputs"]
        assert finished
        assert {p.name for p in partial.iterdir()} == {*finished, "pymerge_manifest.json", ".lock"}, number
        resumed += 1
        merge(resume=True)
    if out.exists():
        assert hashes() == want, number
    remove()
    assert sorted(p.name for p in folder.iterdir()) == ["m0", "m1"], number
mapped = [line for line in open("/proc/self/maps") if str(folder) in line]
assert not mapped, mapped
open_files = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]
assert not [path for path in open_files if str(folder) in path], open_files
print(interrupted, resumed)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "how",
    [
        "again and again",
        *(pytest.param(how, marks=pytest.mark.slow) for how in ("once", "from another thread")),
    ],
)
def test_a_storm_of_interrupts(tmp_path: Path, how: str) -> None:
    arguments = [sys.executable, "-X", "faulthandler", "-c", STORM, how, str(ROUNDS), str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    interrupted, resumed = map(int, done.stdout.split())
    assert interrupted > 0
    # Without a signal the waiting thread looks only now and then, and most of these merges are done by then.
    assert resumed > 0 or how == "from another thread"


def test_the_work_raises_what_the_calling_thread_got() -> None:
    """Whatever it is and wherever it comes: in the callback, or while the thread waits."""
    seen: list[str] = []

    def handler(number: int, frame: object) -> None:
        raise TimeoutError("too long")

    def work() -> None:
        on_calling_thread(lambda: seen.append(threading.current_thread().name))
        os.kill(os.getpid(), signal.SIGUSR1)
        try:
            for _ in range(1000):
                check()
                time.sleep(0.01)
        except TimeoutError:
            seen.append("told")
            raise

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with pytest.raises(TimeoutError, match="too long"):
            Uninterrupted(work).run()
        assert signal.getsignal(signal.SIGUSR1) is handler
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == ["MainThread", "told"]


def test_an_interrupt_that_comes_too_late_is_not_lost() -> None:
    def work() -> int:
        os.kill(os.getpid(), signal.SIGINT)
        return 1

    with pytest.raises(KeyboardInterrupt):
        Uninterrupted(work).run()


def test_work_in_another_thread_is_a_daemon_where_that_one_is() -> None:
    found: list[bool] = []
    work = Uninterrupted(lambda: found.append(threading.current_thread().daemon))
    thread = threading.Thread(target=work.run, daemon=True)
    thread.start()
    thread.join()
    Uninterrupted(lambda: found.append(threading.current_thread().daemon)).run()
    assert found == [True, False]


def test_no_thread_to_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = write_family(tmp_path)

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(ResourceError, match=r"starts no further thread .*ulimit -u"):
        merge_checkpoints(recipe("linear", folders), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "m1", "m2"]


IMPATIENT = """
import os, signal, sys, threading, time
# What Python loads before the command's first line is not the command's to guard.
import concurrent.futures.thread, contextlib, typing

def press():
    for pause in (float(sys.argv.pop(1)), 0.0005, 0.02):
        time.sleep(pause)
        os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell may have it ignored
pressing = threading.Thread(target=press, daemon=True)
pressing.start()
from pymerge.__main__ import main
main()
"""


def test_the_command_says_how_to_go_on(tmp_path: Path) -> None:
    """Ctrl-C three times at any moment: a line, status 130, and then the same model by --resume."""
    (tmp_path / "in").mkdir()
    config = recipe("ties", write_family(tmp_path / "in", dtype=torch.float32), density=0.4)
    (tmp_path / "r.yml").write_text(json.dumps(config))
    started = time.monotonic()
    assert _merge(tmp_path, 100, "other").returncode == 0
    whole = time.monotonic() - started
    chance = random.Random(1)
    for _ in range(12):
        done = _merge(tmp_path, chance.uniform(0, whole), "out", "--resume", "--overwrite")
        if done.returncode != 0:
            assert done.returncode == 130, done.stderr
            assert done.stderr.strip().startswith("interrupted"), done.stderr
            assert len(done.stderr.strip().splitlines()) == 1
        names = {path.name for path in tmp_path.iterdir()}
        assert names <= {"in", "r.yml", "other", "out", ".out.pymerge-partial"}
    merge_checkpoints(config, tmp_path / "out", out_shard_size=1500, resume=True, overwrite=True)
    assert_same(read_result(tmp_path / "out"), expected(config, family(dtype=torch.float32)))


def _merge(folder: Path, pressed_after: float, *arguments: str) -> subprocess.CompletedProcess[str]:
    options = ["--out-shard-size", "1500", "--quiet"]
    command = [sys.executable, "-c", IMPATIENT, str(pressed_after), "merge", "r.yml"]
    return subprocess.run(
        [*command, *arguments, *options], cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("entry", [merge_checkpoints, lambda config, out: plan_checkpoints(config)])
def test_an_interrupt_while_models_are_opened(tmp_path: Path, monkeypatch: Any, entry: Any) -> None:
    """It comes when torch may be half imported: the work goes on to where it can stop."""
    config = recipe("ties", write_family(tmp_path / "in"), density=0.4)
    opened = merging.open_models
    done = []

    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        done.append(True)
        return opened(*arguments)

    monkeypatch.setattr(merging, "open_models", interrupted)
    with pytest.raises(KeyboardInterrupt):
        entry(config, tmp_path / "out")
    assert done
    monkeypatch.setattr(merging, "open_models", opened)
    merge_checkpoints(config, tmp_path / "again")


def test_a_process_that_is_forked_meanwhile_does_not_wait(tmp_path: Path) -> None:
    """It has no thread that works: whatever it does next, it gets an end."""
    folders = write_family(tmp_path)
    for leave in (None, SystemExit(7)):
        children: list[int] = []

        def progress(*_: Any, leave: Any = leave, children: list[int] = children) -> None:
            if not children:
                children.append(os.fork())
                if not children[0] and leave is not None:
                    raise leave

        status = 0
        try:
            merge_checkpoints(
                recipe("linear", folders), tmp_path / f"out{leave}", progress=progress
            )
        except SystemExit as end:
            status = int(str(end.code))
        except RuntimeError as error:
            status = 8 if "was forked while a merge ran" in str(error) else 9
        finally:
            if not children[0]:
                os._exit(status)
        deadline = time.monotonic() + 60
        ended = 0, 0
        while not ended[0] and time.monotonic() < deadline:
            ended = os.waitpid(children[0], os.WNOHANG)
            time.sleep(0.01)
        if not ended[0]:
            os.kill(children[0], signal.SIGKILL)
        assert ended[0] and os.waitstatus_to_exitcode(ended[1]) == (8 if leave is None else 7)


def test_a_process_that_was_forked_meanwhile_holds_no_lock(tmp_path: Path) -> None:
    """As the workers of a data loader do, which live on when the merge was interrupted."""
    config, out, calls = recipe("ties", write_family(tmp_path), density=0.4), tmp_path / "out", []

    def progress(*_: Any) -> None:
        calls.append(os.fork() if len(calls) == 4 else -1)
        if not calls[-1]:
            time.sleep(600)
            os._exit(0)
        if len(calls) == 6:
            raise KeyboardInterrupt

    try:
        with pytest.raises(KeyboardInterrupt):
            merge_checkpoints(config, out, out_shard_size=1000, progress=progress)
        assert merge_checkpoints(config, out, out_shard_size=1000, resume=True).resumed
    finally:
        os.kill(calls[4], signal.SIGKILL)
        os.waitpid(calls[4], 0)


def test_a_merge_while_the_interpreter_deletes_its_last_objects() -> None:
    code = """
from pymerge.interrupt import Uninterrupted

class Late:
    def __init__(self):
        self.kind = Uninterrupted
    def __del__(self):
        self.kind(lambda: print("worked")).run()

late = Late()
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and "the interpreter is ending" in run.stderr


def test_an_interrupt_outside_of_a_command_is_an_interrupt_too() -> None:
    program = """
from pymerge.cli.main import commands

def interrupted(*args, **options):
    raise KeyboardInterrupt

type(commands).make_context = interrupted
from pymerge.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.strip() == "interrupted"


@pytest.mark.parametrize(
    ("command", "module"),
    [
        (["merge", "no.yml", "out"], "pydantic"),
        (["plan", "no.yml"], "pydantic"),
        (["stats", "no/model", "no.txt", "--out", "s"], "torch"),
    ],
)
def test_what_swallows_an_interrupt_is_imported_where_none_is_raised(
    command: list[str], module: str, tmp_path: Path
) -> None:
    program = f"""
import sys, threading

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            print(name, threading.current_thread() is threading.main_thread())

sys.meta_path.insert(0, Finder())
from pymerge.__main__ import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", program, *command], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stdout.split() == [module, "False"]
