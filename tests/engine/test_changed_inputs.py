"""Adapters, tokenizers and a merged model that somebody changes while they are in use: an error that
names the file, and nothing left.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
from adapter_cases import adapter, write_adapter
from file_changes import CHANGES
from folder_cases import recipe, write_family
from token_cases import WORDS, ids_of, shuffled, write_tokenizer

from pymerge.engine import verify
from pymerge.engine.merge import merge_checkpoints
from pymerge.errors import CheckpointError


def left(tmp_path: Path) -> set[str]:
    """What is there beside the inputs."""
    return {path.name for path in tmp_path.iterdir()} - {"base", "m1", "m2"}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "README.md"])
@pytest.mark.parametrize(
    "change", [*CHANGES, None], ids=lambda change: getattr(change, "__name__", "none")
)
def test_a_model_that_changes_while_it_is_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, name: str
) -> None:
    """Between its hashes and its loading by transformers, whatever that finds."""
    merge_checkpoints(recipe("linear", write_family(tmp_path)), tmp_path / "out")
    time.sleep(0.02)

    def load(folder: Path, memory: int) -> dict[str, list[str]]:
        if change is not None:
            change(folder / name)
        return {"done": ["loads"], "problems": []}

    monkeypatch.setattr(verify, "_load", load)
    found = verify.verify_folder(tmp_path / "out")
    if change is None:
        assert found.done[-1] == "loads" and not found.problems
    else:
        assert not found.done
        assert found.problems == (f"{name} changed meanwhile; verify again when nothing writes",)


@pytest.mark.parametrize("rank", [None, "exact", 2])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_adapters(tmp_path: Path, change: Any, name: str, rank: Any) -> None:
    base = write_family(tmp_path, 0)[0]
    adapters = [write_adapter(tmp_path / f"m{k}", adapter(k)) for k in (1, 2)]
    time.sleep(0.02)
    seen: list[int] = []

    def progress(*_: Any) -> None:
        seen.append(1)
        if len(seen) == 2:
            change(adapters[0] / name)

    with pytest.raises(CheckpointError) as caught:
        merge_checkpoints(
            recipe("task_arithmetic", [base, *adapters]),
            tmp_path / "out",
            rank=rank,
            progress=progress,
        )
    assert str(adapters[0] / name) in str(caught.value)
    assert re.search(CHANGES[change], str(caught.value))
    assert not left(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_union_of_tokenizers(tmp_path: Path, change: Any, name: str) -> None:
    folders = write_family(tmp_path)
    for seed, folder in enumerate(folders):
        write_tokenizer(folder, ids_of(shuffled(WORDS, seed)))
    time.sleep(0.02)
    seen: list[int] = []

    def progress(*_: Any) -> None:
        seen.append(1)
        if len(seen) == 1:
            change(folders[2] / name)

    config = recipe("ties", folders, density=0.5) | {"tokenizer_source": "union"}
    with pytest.raises(CheckpointError) as caught:
        merge_checkpoints(config, tmp_path / "out", progress=progress)
    assert str(folders[2] / name) in str(caught.value)
    assert not left(tmp_path)
