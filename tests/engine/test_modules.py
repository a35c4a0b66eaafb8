"""Modules with weights of their own, as sentence-transformers' Dense layers: in the result, as the
model that gives the config has them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folder_cases import recipe, write_family
from safetensors.torch import load_file, save_file

from pymerge.checkpoint.modules import module_folders
from pymerge.checkpoint.reader import open_model
from pymerge.engine.merge import merge_checkpoints, plan_checkpoints
from pymerge.engine.modules import collect_modules
from pymerge.engine.verify import verify_folder
from pymerge.errors import CheckpointError, MismatchError

LISTED = ("", "1_Pooling", "2_Dense", "3_Dense", "4_Normalize")
DENSE = {
    "2_Dense": {"linear.weight": torch.arange(12.0).view(4, 3), "linear.bias": torch.ones(4)},
    "3_Dense": {"linear.weight": torch.arange(6.0).view(2, 3).bfloat16()},
}


def as_embedding_model(folder: Path, *, save: Callable[..., Any] = save_file) -> None:
    (folder / "modules.json").write_text(
        json.dumps([{"idx": k, "name": str(k), "path": path} for k, path in enumerate(LISTED)])
    )
    for path in LISTED[1:4]:
        (folder / path).mkdir()
        (folder / path / "config.json").write_text(json.dumps({"in_features": 3}))
    for path, state in DENSE.items():
        name = "model.safetensors" if save is save_file else "pytorch_model.bin"
        save(state, folder / path / name)


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    made = write_family(tmp_path / "in", dtype=torch.float32)
    for folder in made:
        as_embedding_model(folder)
    return made


@pytest.fixture
def config(folders: list[Path]) -> dict[str, Any]:
    return recipe("ties", folders, density=0.4)


def assert_has_modules(out: Path) -> None:
    for path, state in DENSE.items():
        found = load_file(out / path / "model.safetensors")
        assert found.keys() == state.keys()
        for name, tensor in state.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        assert (out / path / "config.json").is_file()
    assert (out / "1_Pooling" / "config.json").is_file()


def of_modules(notes: tuple[str, ...]) -> list[str]:
    return [note for note in notes if "_Dense" in note and not note.startswith("copied: ")]


def test_they_are_copied_and_that_is_told(folders: list[Path], config: Any, tmp_path: Path) -> None:
    summary = merge_checkpoints(config, tmp_path / "out")
    assert_has_modules(tmp_path / "out")
    said = f"the weights of 2_Dense/, 3_Dense/ are copied from {folders[0]}, not merged"
    assert of_modules(summary.notes) == [said]
    assert of_modules(plan_checkpoints(config, strict=True).notes) == [said]
    manifest = json.loads((tmp_path / "out" / "pymerge_manifest.json").read_text())
    assert {f"{path}/model.safetensors" for path in DENSE} < set(manifest["copied"])
    merge_checkpoints(config, tmp_path / "out", overwrite=True)
    (tmp_path / "out" / "2_Dense" / "model.safetensors").write_bytes(b"other")
    assert "2_Dense/model.safetensors: not what the merge wrote" in str(
        verify_folder(tmp_path / "out").problems
    )


def test_pytorch_files_become_safetensors(tmp_path: Path) -> None:
    folders = write_family(tmp_path / "in", dtype=torch.float32)
    as_embedding_model(folders[0], save=torch.save)
    for folder in folders[1:]:
        as_embedding_model(folder)
    summary = merge_checkpoints(recipe("linear", folders[:1] + folders), tmp_path / "out")
    assert_has_modules(tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.bin"))
    (note,) = of_modules(summary.notes)
    assert note.endswith("not merged"), "equal tensors in another format are no difference"


def otherwise(folder: Path) -> str:
    save_file({"linear.weight": torch.zeros(4, 3)}, folder / "2_Dense" / "model.safetensors")
    return f"2_Dense/ of {folder} has other weights"


def lacking(folder: Path) -> str:
    (folder / "3_Dense" / "model.safetensors").unlink()
    return f"3_Dense/ of {folder} is not there"


def surplus(folder: Path) -> str:
    (folder.parent / "base" / "modules.json").write_text("[]")
    return f"2_Dense/, 3_Dense/ of {folder} are left out, since {folder.parent / 'base'} has none"


@pytest.mark.parametrize("change", [otherwise, lacking, surplus])
def test_what_a_model_has_otherwise_is_told(
    folders: list[Path], config: Any, change: Callable[[Path], str]
) -> None:
    said = change(folders[2])
    plan = plan_checkpoints(config)
    assert not plan.problems
    assert said in str(of_modules(plan.notes))
    (problem,) = plan_checkpoints(config, strict=True).problems
    assert said in problem and "strict" in problem


def test_damaged_and_too_large_ones_are_errors(
    folders: list[Path], config: Any, tmp_path: Path
) -> None:
    model = open_model(str(folders[0]))
    (problem,) = collect_modules(model, [model], strict=False, most_bytes=70).problems
    assert "more than 70 bytes of weights of their own" in problem
    (folders[0] / "2_Dense" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"2_Dense/model\.safetensors"):
        merge_checkpoints(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["gone", "itself"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_links_to_nothing(folders: list[Path], config: Any, name: str, target: str) -> None:
    """Of the model that gives the modules an error, of another one told."""
    said = rf"2_Dense/{re.escape(name)}: (is a link to gone, which|cannot be opened)"
    for folder in folders[1], folders[0]:
        (folder / "2_Dense" / "model.safetensors").unlink()
        (folder / "2_Dense" / name).symlink_to(name if target == "itself" else target)
        plan = plan_checkpoints(config)
        assert re.search(said, str(plan.problems if folder is folders[0] else plan.notes))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('[{"path": "2_Dense"}, {"path": "a/b/"}, {"path": ""}]', ["2_Dense", "a/b"]),
        ('[{"path": "../x"}, {"path": "/x"}, {"path": 1}, 2, {}, {"path": ".git"}]', []),
        ('{"path": "2_Dense"}', []),
        (
            json.dumps([{"path": "a/" * 8}, {"path": "a/" * 9}, {"path": "a/" * 2000}]),
            ["a/" * 7 + "a"],
        ),
        ("[", []),
        ("", []),
    ],
)
def test_only_folders_inside_are_looked_into(tmp_path: Path, text: str, found: list[str]) -> None:
    (tmp_path / "modules.json").write_text(text)
    assert module_folders(tmp_path) == found


def test_those_of_a_hub_id_are_downloaded(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    from pymerge.checkpoint.hub import locate

    (folders[0] / "3_Dense" / "model.safetensors").unlink()
    asked: list[list[str]] = []

    def snapshot(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        if "pytorch_model.bin" in allow_patterns[-1]:
            torch.save(DENSE["3_Dense"], folders[0] / "3_Dense" / "pytorch_model.bin")
        return str(folders[0])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert locate("some/embedder") == folders[0]
    wanted = ["1_Pooling", "3_Dense", "4_Normalize"]
    assert asked[1:] == [
        [f"{path}/model.safetensors" for path in wanted],
        [f"{path}/pytorch_model.bin" for path in wanted],
    ]


def test_strict_is_raised_before_any_work(folders: list[Path], config: Any, tmp_path: Path) -> None:
    otherwise(folders[1])
    with pytest.raises((CheckpointError, MismatchError), match="has other weights"):
        merge_checkpoints(config, tmp_path / "out", strict=True)
    assert not (tmp_path / "out").exists()
