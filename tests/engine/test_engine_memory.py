"""Out of core: anonymous memory does not grow with the models, and no torch or numpy is imported on
the way.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from folder_cases import recipe, write_family
from safetensors.torch import save_file

RUN = """
import json, sys, threading, time
from pathlib import Path
from pymerge.engine.merge import merge_checkpoints

config, out = json.loads(sys.argv[1])
peak, stop = 0, threading.Event()

def watch():
    global peak
    while not stop.wait(0.002):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                peak = max(peak, int(line.split()[1]) * 1024)

thread = threading.Thread(target=watch, daemon=True)
thread.start()
summary = merge_checkpoints(config, out)
stop.set()
thread.join()
read = int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])
print(json.dumps({"peak": peak, "read": summary.bytes_read, "rchar": read, "modules": list(sys.modules)}))
"""


def measured(config: Any, out: Path, **environment: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps([config, str(out)])],
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and three models of 192 MB: one tensor of 160 MB, ten of 3 MB, all with much to
    trim.
    """
    root = tmp_path_factory.mktemp("large")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1 << 22, generator=generator)
    base = torch.randn(1 << 22, generator=generator) * 0.1
    folders = []
    for number in range(4):
        moved = (base + 0.01 * number * noise.roll(1000 * number)).bfloat16()
        whole = torch.cat([moved.roll(7 * k) for k in range(20)])
        state = {"large.weight": whole[: 80 << 20].reshape(-1, 1024)}
        state |= {f"layers.{k}.weight": moved[k : k + 3 * (1 << 19)].clone() for k in range(10)}
        folders.append(root / f"m{number}")
        folders[-1].mkdir()
        save_file(state, folders[-1] / "model.safetensors")
        (folders[-1] / "config.json").write_text("{}")
    return folders


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("way", ["mmap", "read"])
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_anonymous_memory(tmp_path: Path, large: list[Path], method: str, way: str) -> None:
    """Whatever the size: the staging blocks, the kernels' scratch and, where files are read, the
    ring.
    """
    parameters = {} if method == "linear" else {"density": 0.3}
    found = measured(recipe(method, large, **parameters), tmp_path / "out", PYMERGE_IO=way)
    limit = (128 + 64 + 64 + (128 if way == "read" else 0)) << 20
    assert found["peak"] < limit < 512 << 20
    assert found["read"] > limit
    if way == "read" and method == "linear":
        assert found["read"] <= found["rchar"] < found["read"] * 1.05


def test_imports(tmp_path: Path) -> None:
    folders = write_family(tmp_path)
    found = measured(recipe("ties", folders, density=0.3), tmp_path / "out")
    for module in ("torch", "numpy", "transformers", "huggingface_hub", "safetensors", "rich"):
        assert module not in found["modules"]
