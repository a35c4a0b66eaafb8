"""Models whose weights are not at the top of their folder, and parts of diffusers' pipelines, whose
files have names of their own.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from folder_cases import State, assert_same, write_model
from safetensors.torch import load_file, save_file

from pymerge.checkpoint.reader import open_model
from pymerge.engine.merge import merge_checkpoints
from pymerge.errors import CheckpointError

CONFIG = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.30.0"}
STEM = "diffusion_pytorch_model"


def state(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    names = [f"down_blocks.{k}.conv.weight" for k in range(4)]
    return {name: torch.randn(4, 4, 3, 3, generator=generator) for name in names}


def pipeline(folder: Path, seed: int, *, pickled: bool = False) -> Path:
    for part in ("unet", "vae"):
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(CONFIG))
        if pickled:
            torch.save(state(seed), folder / part / f"{STEM}.bin")
        else:
            save_file(state(seed), folder / part / f"{STEM}.safetensors")
    (folder / "scheduler").mkdir()
    (folder / "model_index.json").write_text("{}")
    return folder


def test_a_pipeline_names_its_parts(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "a", 0)
    with pytest.raises(CheckpointError, match=r"its parts have them \(unet, vae\)"):
        open_model(str(folder))


def test_an_older_embedding_model_names_its_transformer(tmp_path: Path) -> None:
    write_model(tmp_path / "a" / "0_Transformer", {"w": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"such as '.*0_Transformer'"):
        open_model(str(tmp_path / "a"))


@pytest.mark.parametrize("size", ["5GB", 600])
@pytest.mark.parametrize("pickled", [False, True])
def test_the_result_is_called_as_diffusers_looks_for_it(
    tmp_path: Path, pickled: bool, size: str | int
) -> None:
    parts = [pipeline(tmp_path / f"m{k}", k, pickled=pickled) / "unet" for k in range(2)]
    models = [{"model": str(part), "parameters": {"weight": 0.5}} for part in parts]
    config = {"merge_method": "linear", "models": models}
    out = tmp_path / "out"
    for overwrite in (False, True):
        merge_checkpoints(config, out, out_shard_size=size, overwrite=overwrite)
    files = sorted(path.name for path in out.glob("*.safetensors"))
    index = out / f"{STEM}.safetensors.index.json"
    if size == "5GB":
        assert files == [f"{STEM}.safetensors"]
        assert not index.exists()
    else:
        assert files == [
            f"{STEM}-{k}-of-00004.safetensors" for k in ("00001", "00002", "00003", "00004")
        ]
        assert set(json.loads(index.read_text())["weight_map"].values()) == set(files)
    found: State = {}
    for file in files:
        found |= load_file(out / file)
    assert_same(found, {name: (t + state(1)[name]) / 2 for name, t in state(0).items()})
    assert json.loads((out / "config.json").read_text()) == CONFIG
