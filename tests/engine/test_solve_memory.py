"""The plan's figure for the memory of solving, and of methods on matrices, holds: measured on a
layer that is large beside the engine's own blocks.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from folder_cases import write_model
from solve_cases import recipe, write_statistics

RUN = """
import json, sys, threading
from pathlib import Path
import torch
import pymerge.engine.by_statistics
from pymerge.engine.merge import merge_checkpoints, plan_checkpoints

def anonymous():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024

config, out = json.loads(sys.argv[1])
plan = plan_checkpoints(config)
torch.linalg.cholesky(torch.eye(300) @ torch.eye(300))
start, peak, stop = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not stop.wait(0.002):
        peak = max(peak, anonymous())

thread = threading.Thread(target=watch, daemon=True)
thread.start()
merge_checkpoints(config, out)
stop.set()
thread.join()
print(json.dumps([plan.memory, peak - start, peak]))
"""
BLOCKS = 160 << 20  # staging blocks and the ring of the engine, whatever it merges


@pytest.mark.parametrize("method", ["mats", pytest.param("regmean", marks=pytest.mark.slow)])
def test_peak_is_within_the_plan(tmp_path: Path, method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    folders, files = [], []
    for k in range(2):
        state = {
            f"model.layers.{i}.mlp.up_proj.weight": torch.randn(1536, 1536, generator=generator)
            for i in range(2)
        }
        folders.append(write_model(tmp_path / f"m{k}", state))
        files.append(write_statistics(tmp_path / f"{k}.stats", state, k))
    planned, peak, whole = measured(recipe(method, folders, files), tmp_path / "out")
    assert peak < planned + BLOCKS
    assert planned < 3 * peak
    assert whole < 512e6 + planned  # as the plan's last line and docs/checkpoints.md say


@pytest.mark.slow
@pytest.mark.parametrize("method", ["wudi", "tsv", "iso_c"])
def test_peak_of_methods_on_matrices_is_within_the_plan(tmp_path: Path, method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    name = "model.layers.0.mlp.up_proj.weight"
    states = [{name: torch.randn(2048, 1024, generator=generator)} for _ in range(4)]
    base, *folders = [write_model(tmp_path / f"m{k}", s) for k, s in enumerate(states)]
    models = [{"model": str(folder)} for folder in folders]
    config = {"merge_method": method, "base_model": str(base), "models": models}
    planned, peak, whole = measured(config, tmp_path / "out")
    assert peak < planned + BLOCKS
    assert planned < 4 * peak
    assert whole < 512e6 + planned


def measured(config: dict[str, Any], out: Path) -> tuple[int, int, int]:
    """Bytes: planned, at the peak above those before, and at the peak in all."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps([config, str(out)])],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    planned, peak, whole = json.loads(done.stdout)
    return planned, peak, whole
