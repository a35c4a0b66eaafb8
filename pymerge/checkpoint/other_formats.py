"""What is found in place of a model (another format, a pointer to a file, a folder of models), and
what to do about it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pymerge.checkpoint.files import exists, is_file, open_regular
from pymerge.messages.words import some_names

# By the names of their files or folders; the way out of each.
_FORMATS = (
    (r".*\.gguf|ggml.*\.bin", "a file of llama.cpp; name the model that it was converted from"),
    (
        r"tf_model.*\.h5|flax_model.*\.msgpack|tf_model-.*|.*\.ckpt\.index",
        "weights of TensorFlow or Flax; load them in a transformers release that reads them"
        " (from_tf or from_flax), and save them again",
    ),
    (r".*\.onnx", "a model of ONNX; name the one that it was exported from"),
    (
        r"global_step\d+|mp_rank_\d+_model_states\.pt|zero_pp_rank_.*",
        "a checkpoint of DeepSpeed; gather it first (python zero_to_fp32.py . OUT) and name OUT",
    ),
    (
        r"\.metadata|.*\.distcp",
        "a part of a distributed checkpoint; name its folder, in which .metadata lies with the"
        " .distcp files",
    ),
    (
        r"pytorch_model_fsdp_\d+",
        "the model's part of a distributed checkpoint, and lacks its .metadata; copy it too",
    ),
    (r".*\.nemo", "an archive of NeMo; export it for transformers"),
    (
        r"consolidated\.\d+\.pth",
        "weights as Meta names and splits them; convert them for transformers",
    ),
)
_OF_TRAINER = re.compile(r"checkpoint-\d+")
_POINTER = b"version https://git-lfs.github.com/"


def is_pointer(path: Path) -> bool:
    """Whether a file is what Git stores in the place of a large one. False for what cannot be
    read.
    """
    try:
        with open_regular(path) as file:
            return file.read(len(_POINTER)) == _POINTER
    except OSError:
        return False


def other_format(name: str) -> str:
    """`, which is WHAT; WAY OUT` of a file or folder of that name; "" for an unknown one."""
    found = next((way for pattern, way in _FORMATS if re.fullmatch(pattern, name)), None)
    return "" if found is None else f", which is {found}"


def why_empty(folder: Path, weights: Sequence[str]) -> str:
    """Why a folder is no model, and the way out. weights: names of files that hold models."""
    if exists(folder / "adapter_config.json"):
        return "holds an adapter, not a model; name its base with it, as base+adapter"
    several = sorted(path.name for path in folder.glob("*.safetensors"))
    if several:
        return (
            f"holds {len(several)} safetensors file{'s' * (len(several) > 1)}"
            f" ({some_names(several)}) but no model.safetensors.index.json that says what is in"
            " them; download the index too"
        )
    parts = _parts(folder, weights)
    if parts and all(map(_OF_TRAINER.fullmatch, parts)):
        last = max(parts, key=lambda name: int(name.rpartition("-")[2]))
        return (
            f"holds no weights itself, but checkpoints of a training ({some_names(parts)}): name"
            f" one of these, such as {str(folder / last)!r}"
        )
    if parts:
        return (
            f"holds no weights itself; its parts have them ({some_names(parts)}): merge each of"
            f" these as a model of its own, such as {str(folder / parts[0])!r}, and put the results"
            " in their places in a copy of the folder"
        )
    for path in _entries(folder):
        way = other_format(path.name)
        if way and path.name.isprintable():
            return f"holds no model that can be read here, but {path.name}{way}"
    return (
        "holds no model: neither model.safetensors, model.safetensors.index.json, pytorch_model.bin"
        " nor pytorch_model.bin.index.json"
    )


def _parts(folder: Path, names: Sequence[str]) -> list[str]:
    """The folders in it that are models: those of a diffusers pipeline (`unet/`), or of an older
    embedding model (`0_Transformer/`).
    """
    wanted = {*names, *(f"{name}.index.json" for name in names)}
    return [
        path.name
        for path in _entries(folder)
        if path.name.isprintable() and any(is_file(path / name) for name in wanted)
    ]


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []
