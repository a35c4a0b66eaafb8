"""Which backend runs an op: the registry's table, and what "auto" takes."""

from __future__ import annotations

import importlib

import pytest

from pymerge.backends import registry
from pymerge.backends.cg.cuda import CudaUpdates
from pymerge.backends.cg.iteration import VectorUpdates
from pymerge.backends.registry import vector_updates


@pytest.mark.parametrize("op", registry.TABLE)
def test_every_entry_names_something_that_is_there(op: str) -> None:
    for backend, place in registry.TABLE[op].items():
        assert backend in registry.BACKENDS
        module, _, name = place.partition(":")
        if backend == "triton":
            pytest.importorskip("triton")
        assert callable(getattr(importlib.import_module(module), name))
        assert registry.load(op, backend) is getattr(importlib.import_module(module), name)


def test_auto_takes_the_first_that_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYMERGE_BACKEND", raising=False)
    there = ["cuda", "triton"]
    monkeypatch.setattr(registry, "why_not", lambda name: None if name in there else "not here")
    assert [registry.pick(op, "cuda")[0] for op in ("ties", "select", "cg")] == ["cuda"] * 3
    assert registry.pick_many()[0] == "cuda" and vector_updates("cuda") is CudaUpdates
    there.remove("cuda")
    assert [registry.pick(op, "cuda")[0] for op in ("ties", "select", "cg")] == ["triton"] * 3
    assert (
        registry.pick_many()[0] == "triton" and vector_updates("cuda").__name__ == "TritonUpdates"
    )
    there.clear()
    assert (
        registry.pick("ties", "cuda")[0] == "reference" and vector_updates("cuda") is VectorUpdates
    )
