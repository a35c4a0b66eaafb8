"""What several test files share and is costly to make."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The launchers over emulated CUDA kernels, compiled once a test session (and a worker)."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    spec = importlib.util.spec_from_file_location(
        "cuda_emulation_build", Path(__file__).parent / "cuda_emulation/build.py"
    )
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    return build.load(tmp_path_factory.mktemp("cuda_emulation"))
