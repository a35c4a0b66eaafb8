"""Where the folder of a training holds a checkpoint of torch.distributed, by the names in it."""

from __future__ import annotations

import re
from pathlib import Path

from pymerge.checkpoint.files import exists

METADATA = ".metadata"
# The model's part of a checkpoint of accelerate or transformers, whose folder has the small files.
_OF_ACCELERATE = "pytorch_model_fsdp_0"
_SHARD = re.compile(r"shard-\d+-model-\d+-of-\d+\.safetensors")


def distributed_in(folder: Path) -> Path | None:
    """The folder that is a distributed checkpoint: this one, or the model's part in it."""
    for place in (folder, folder / _OF_ACCELERATE):
        if exists(place / METADATA) or safetensors_parts(place):
            return place
    return None


def safetensors_parts(folder: Path) -> list[Path]:
    """The files of torch's HuggingFaceStorageWriter, where each process saved its own."""
    try:
        return sorted(path for path in folder.iterdir() if _SHARD.fullmatch(path.name))
    except OSError:
        return []
