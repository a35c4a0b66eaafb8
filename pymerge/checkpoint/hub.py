"""A model reference to a path: a folder, a file, or a repository of the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from pymerge.checkpoint.files import MAX_INDEX, read_json
from pymerge.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?")
_SMALL_FILES = [
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.tiktoken",
    "*.spm",
    "bpe.codes",
    "*.py",
    "additional_chat_templates/*",
]


def locate(reference: str) -> Path:
    """The folder or file that a reference means; a local path wins over a hub id of the same name.

    Hub ids ("owner/name" or "owner/name@revision") go through huggingface_hub with its usual
    environment: its cache, token, HF_HUB_OFFLINE. Raises CheckpointError that says what was looked
        for.
    """
    path = _local(reference)
    if path is not None:
        return path
    if "+" in reference and _local(reference.split("+", 1)[0]) is not None:
        raise CheckpointError(
            f"model {reference!r} asks for an adapter on top of a model, which is not supported"
            " yet; merge the adapter into its model first (peft: merge_and_unload) and name the"
            " result"
        )
    if not _HUB_ID.fullmatch(reference) or reference.endswith(
        (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
    ):
        raise CheckpointError(
            f"model {reference!r} does not exist; give a folder, a .safetensors, .bin, .pt, .pth or"
            " .ckpt file, or a hub id such as 'owner/name'"
        )
    return _snapshot(reference)


def _local(reference: str) -> Path | None:
    try:
        path = Path(reference).expanduser()
        return path if reference and path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long, a NUL inside, no such user's home
        return None


def _snapshot(reference: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"model {reference!r} is not a folder here, and hub ids need huggingface_hub; "
            "pip install huggingface_hub, or give a folder"
        ) from None
    name, _, revision = reference.partition("@")

    def fetch(patterns: list[str]) -> Path:
        found = snapshot_download(name, revision=revision or None, allow_patterns=patterns)
        return Path(str(found))

    try:
        folder = fetch([*_SMALL_FILES, "model.safetensors"])
        if not (folder / "model.safetensors").exists():
            shards = _shards(folder / "model.safetensors.index.json")
            other = _shards(folder / "pytorch_model.bin.index.json") or ["pytorch_model.bin"]
            fetch(shards or other)
    except (
        Exception
    ) as error:  # huggingface_hub raises many kinds: HTTP, validation, cache, offline
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"model {reference!r} is not a folder here and could not be had from the hub"
            f" ({reason}); check the name, log in (hf auth login) if it is private or gated, or"
            " give a folder"
        ) from None
    return folder


def _shards(index: Path) -> list[str]:
    """The files that an index names, to be checked when the folder is read."""
    try:
        weights = read_json(index, MAX_INDEX)["weight_map"]
        return sorted({str(file) for file in weights.values()})
    except (CheckpointError, KeyError, AttributeError):
        return []
