"""The machine and the installation in plain data, for results, `pymerge doctor` and bug reports."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pymerge.version import __version__

REQUIRED = (
    "torch",
    "numpy",
    "safetensors",
    "PyYAML",
    "pydantic",
    "click",
    "rich",
    "huggingface_hub",
)
# Distribution -> what takes it.
OPTIONAL = {
    "triton": "the backend triton, on a GPU",
    "transformers": "pymerge verify, pymerge stats",
    "peft": "pymerge.compat.peft.patch(), pymerge bench --peers",
    "mergekit": "pymerge.compat.mergekit.patch(), pymerge bench --peers",
    "matplotlib": "the charts of benchmarks/",
}


def versions() -> dict[str, str | None]:
    """Of pymerge, Python and the packages that pymerge uses, None where one is not installed."""
    found: dict[str, str | None] = {"pymerge": __version__, "python": platform.python_version()}
    found.update((name, _version(name)) for name in (*REQUIRED, *OPTIONAL))
    return found


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def system() -> str:
    """The operating system and the architecture."""
    return f"{platform.system()} {platform.release()} {platform.machine()}"


def processor() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def usable_cpus() -> int:
    """How many processors this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def memory_bytes() -> int:
    """Of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def describe_machine() -> dict[str, Any]:
    """Where and with what the numbers of a benchmark were made."""
    import torch

    from pymerge.backends import native

    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_level": native.cpu_level(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "pymerge": __version__,
        "commit": _commit() or os.environ.get("COMMIT"),
    }


def _commit() -> str:
    """Of a clone; "" elsewhere, and where there is no git."""
    try:
        git = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
            check=False,
        )
    except OSError:
        return ""
    return git.stdout.strip()


def to_install() -> list[tuple[str, str]]:
    """(command, what needs it) for all that is missing here."""
    found = versions()
    lines = [(f"pip install {name}", "pymerge itself") for name in REQUIRED if found[name] is None]
    for name, use in OPTIONAL.items():
        if found[name] is None and (name != "triton" or platform.system() == "Linux"):
            lines.append((f"pip install {name}", use))
    try:
        extension: Any = importlib.import_module("pymerge.backends.native").load()
    except ImportError:
        lines.append(("pip install .", "the compiled kernels (in a clone of the sources)"))
        return lines
    if not extension.with_cuda:
        nvcc = "" if shutil.which("nvcc") else "NVIDIA's CUDA toolkit, for nvcc, and then "
        command = f"{nvcc}PYMERGE_CUDA=1 pip install --force-reinstall --no-deps ."
        lines.append((command, "the backend cuda, on an NVIDIA GPU (in a clone of the sources)"))
    return lines
