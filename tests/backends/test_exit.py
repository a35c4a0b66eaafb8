"""Daemon threads within pymerge when the process ends, and processes that are forked while kernels
run.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapter_cases import adapter, write_adapter
from folder_cases import recipe, write_family
from safetensors.torch import load_file

# Every child is a process that ends as a program does, by the end of its file, with its daemons
# wherever they are.
ENDING = """
import json, os, random, sys, threading, time
import torch
import pymerge
from pymerge.backends import native

what, rounds, config, folder = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4]
large = [torch.randn(1 << 18) for _ in range(3)]
small = [torch.randn(1 << 10) for _ in range(3)]
weights = [torch.randn(64, 64) for _ in range(2)]
grams = [w @ w.T + torch.eye(64) for w in weights]
halves = (small[0].data_ptr(), "float16")

def bad():
    try:
        native.cg_dot(halves, halves, 4, 64)
    except ValueError:
        pass

calls = {
    "ties": lambda: pymerge.ties(large[1:], large[0], density=0.2),
    "small ties": lambda: pymerge.ties(small[1:], small[0], density=0.2),
    "select": lambda: pymerge.select(large[1:], large[0], density=0.2),
    "mats": lambda: pymerge.mats(weights, grams),
    "regmean": lambda: pymerge.regmean(weights, grams),
    "gram": lambda: pymerge.gram(large, per="row"),
    "combine": lambda: pymerge.combine(large, [0.2, 0.3, 0.5]),
    "sce": lambda: pymerge.sce(large[1:], large[0], select_topk=0.3),
    "arcee_fusion": lambda: pymerge.arcee_fusion(large[1:2], large[0]),
    "magprune": lambda: pymerge.ties(large[1:], large[0], trim="magprune", density=0.5),
    "errors": bad,
    "adapters": lambda: pymerge.merge_checkpoints(config, f"{folder}/{threading.get_ident()}", overwrite=True, threads=2),
    "merge_checkpoints": lambda: pymerge.merge_checkpoints(config, f"{folder}/{threading.get_ident()}", overwrite=True, threads=2),
}
native.cpu_level()
chance = random.Random(0)

def forever():
    while True:
        calls[what]()

for number in range(rounds):
    child = os.fork()
    if child == 0:
        for _ in range(3):
            threading.Thread(target=forever, daemon=True).start()
        time.sleep(chance.uniform(0.02, 0.1) if number else 0.3)
        break
    _, status = os.waitpid(child, 0)
    if status:
        print(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.parametrize(
    ("what", "rounds"),
    [
        ("ties", 2),
        ("small ties", 2),
        ("merge_checkpoints", 2),
        ("gram", 2),
        *(
            pytest.param(what, 2, marks=pytest.mark.slow)
            for what in ("adapters", "combine", "sce", "arcee_fusion", "magprune")
        ),
        *(
            pytest.param(what, 24, marks=pytest.mark.slow)
            for what in ("ties", "small ties", "select", "mats", "regmean", "errors")
        ),
    ],
)
def test_daemon_threads_at_the_end(tmp_path: Path, what: str, rounds: int) -> None:
    config = {}
    if what in ("merge_checkpoints", "adapters"):
        config = recipe("linear", write_family(tmp_path / "in"))
    if what == "adapters":
        for k, model in enumerate(config["models"]):
            update = write_adapter(tmp_path / f"adapter{k}", adapter(k))
            model["model"] = f"{model['model']}+{update}"
    done = run(ENDING, what, str(rounds), json.dumps(config), str(tmp_path))
    assert (done.returncode, done.stdout) == (0, ""), done.stderr[-2000:]


LATE = """
import json, sys, threading, traceback
import pymerge

def late():
    threading.main_thread().join()
    try:
        pymerge.merge_checkpoints(json.loads(sys.argv[1]), sys.argv[2], progress=lambda *_: None)
        print("merged")
    except BaseException:
        traceback.print_exc()

threading.Thread(target=late).start()
"""


@pytest.mark.parametrize("pickled", [False, True])  # for which torch is imported
def test_a_merge_that_begins_when_the_main_thread_has_ended(tmp_path: Path, pickled: bool) -> None:
    folders = write_family(tmp_path / "in")
    for folder in folders if pickled else ():
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    done = run(LATE, json.dumps(recipe("linear", folders)), str(tmp_path / "out"))
    assert (done.returncode, done.stdout) == (0, "merged\n"), done.stderr[-2000:]
    assert (tmp_path / "out" / "model.safetensors").exists()


FORKING = """
import multiprocessing, threading, sys
import torch
import pymerge
from pymerge.backends import native

tensors = [torch.randn(1 << 18) for _ in range(3)]

def merge():
    return pymerge.ties(tensors[1:], tensors[0], density=0.2)

def same(want):
    return all(torch.equal(merge(), want) for _ in range(3))

torch.set_num_threads(2)
want = merge()
stop = threading.Event()

def forever():
    while not stop.is_set():
        merge()

threads = [threading.Thread(target=forever) for _ in range(3)]
for thread in threads:
    thread.start()
for _ in range(10):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert all(pool.map(same, [want, want]))
stop.set()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_kernels_in_a_forked_process() -> None:
    """While other threads of the parent are in kernels, with whatever locks they hold then."""
    done = run(FORKING)
    assert done.returncode == 0, done.stderr[-2000:]


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
