"""What several test files share and is costly to make."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import inspect
import os
import shutil
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The launchers over emulated CUDA kernels, compiled once a test session, whatever the
    workers.
    """
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    spec = importlib.util.spec_from_file_location(
        "cuda_emulation_build", Path(__file__).parent / "cuda_emulation/build.py"
    )
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    session = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        session = session.parent
    return build.load(session / "cuda_emulation")


@pytest.fixture
def emulated_cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the host are a GPU's, for backend="cuda" of what solves."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("runs where Triton is not interpreted")
    from pymerge.backends import cuda, native, registry

    emulated = request.getfixturevalue("emulated")
    monkeypatch.setattr(native, "cuda", lambda: emulated.cuda)
    monkeypatch.setattr(cuda, "place", lambda device: (0, 3, 0))  # multiprocessors, no stream
    monkeypatch.setitem(registry.ORDER, "cpu", ("cpu", "reference", "cuda"))
    plain = registry.why_not
    monkeypatch.setattr(registry, "why_not", lambda name: None if name == "cuda" else plain(name))


# Files with tests that take a minute: first, so that no worker is left with one at the end.
LONG = (
    "test_interpreted.py",
    "test_cuda_compile.py",
    "test_triton_aot.py",
    "test_packaging.py",
    "test_processors.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)
    for item in items:
        if runs_on_gpu(item):
            item.add_marker("gpu")


def runs_on_gpu(item: pytest.Item) -> bool:
    """Whether a case is of a backend that runs on a GPU which is here: `pytest -m gpu` is the check
    of a device, whatever file its cases are in.
    """
    given = getattr(item, "callspec", None)
    names = [] if given is None else [x for x in given.params.values() if isinstance(x, str)]
    return any(name in ON_A_GPU and usable_on_gpu(name) for name in names)


ON_A_GPU = ("cuda", "triton")


@functools.cache
def usable_on_gpu(backend: str) -> bool:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return False
    import torch

    from pymerge.backends import registry

    return torch.cuda.is_available() and registry.why_not(backend) is None


@pytest.fixture(params=ON_A_GPU)
def on_gpu(request: pytest.FixtureRequest) -> str:
    """A backend that runs on the GPU at hand; skipped where there is none."""
    if not usable_on_gpu(request.param):
        pytest.skip(f"backend {request.param!r} runs on no GPU here")
    return request.param


@pytest.fixture(params=[*ON_A_GPU, "emulated"])
def on_gpu_or_emulated(request: pytest.FixtureRequest) -> str:
    """The same, and "emulated" where there is none."""
    here = [name for name in ON_A_GPU if usable_on_gpu(name)]
    if request.param not in (here or ["emulated"]):
        pytest.skip(f"runs on {' and '.join(here) or 'emulated kernels'} here")
    if request.param == "emulated" and os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("runs where Triton is not interpreted")
    return request.param


def pytest_configure() -> None:
    """Half of the time of Triton's interpreter goes into two things that change no result: it looks
    through triton.language for what to replace afresh at every call of a function inside a kernel,
    and computes every sum and product a second time for an assertion on overflow that it makes in
    debug mode only.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        return
    from triton.language import core
    from triton.runtime import interpreter

    @functools.cache
    def names(package: object) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if core.is_builtin(member)]

    def getmembers(package: object) -> list[tuple[str, object]]:
        found = names(package)
        if not found or not core.is_builtin(getattr(package, found[0])):
            return []  # replaced by now
        return [(name, getattr(package, name)) for name in found]

    interpreter.inspect = SimpleNamespace(**{**vars(inspect), "getmembers": getmembers})
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
