"""Compiles csrc/cuda for the host, over emulate.h, into a module with the interface of
`pymerge._C.cuda`.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
NAME = "pymerge_cuda_emulated"
# Thresholds of the size classes, lowered so that small tensors go through every path.
SIZES = [
    "-DPYMERGE_SMALL=4096",
    "-DPYMERGE_SAMPLED_FROM=16384",
    "-DPYMERGE_RECORD_PERCENT=40",
    "-DPYMERGE_SAMPLE_SHARE=2",
]
FLAGS = [
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-DPYMERGE_EMULATE",
    *SIZES,
]


def load(folder: Path) -> ModuleType:
    """The module, built under `folder` unless one of the same sources is there already."""
    import pybind11

    cxx = shlex.split(os.environ.get("CXX", "c++"))
    includes = [
        f"-I{CSRC}",
        f"-I{HERE}",
        f"-I{pybind11.get_include()}",
        f"-I{sysconfig.get_path('include')}",
    ]
    command = [*cxx, *FLAGS, *includes]
    sources = [
        *sorted((CSRC / "cuda").rglob("*.cu")),
        CSRC / "cuda/bindings.cpp",
        HERE / "module.cpp",
    ]
    read = [
        *sources,
        *sorted(CSRC.rglob("*.h")),
        *sorted(CSRC.rglob("*.cuh")),
        HERE / "emulate.h",
    ]
    digest = hashlib.sha256(" ".join([*command, sys.version]).encode())
    for path in read:
        digest.update(path.read_bytes())
    target = folder / f"{NAME}-{digest.hexdigest()[:16]}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # two of a session's processes would each build it
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _build(command, sources, target)
    spec = importlib.util.spec_from_file_location(NAME, target)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _build(command: list[str], sources: list[Path], target: Path) -> None:
    work = target.with_suffix(".build")
    work.mkdir(exist_ok=True)
    objects = [work / f"{source.name}.o" for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(
            pool.map(
                lambda pair: _run([*command, "-x", "c++", "-c", pair[0], "-o", pair[1]]),
                zip(sources, objects, strict=True),
            )
        )
    unfinished = target.with_suffix(".unfinished")
    _run([*shlex.split(os.environ.get("CXX", "c++")), "-shared", *objects, "-o", unfinished])
    unfinished.rename(target)


def _run(command: list[object]) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")
