"""The path of a model reference: a folder, a file, or a repository of the Hugging Face hub."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pymerge.checkpoint.files import MAX_INDEX, check_searchable, is_there, read_json
from pymerge.checkpoint.modules import WEIGHTS as MODULE_WEIGHTS
from pymerge.checkpoint.modules import module_folders, with_weights
from pymerge.errors import CheckpointError

_LOG = logging.getLogger("pymerge.hub")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?")
_MOST_PLUSES = 16  # in a path and one of an adapter
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


# The hub's cache where one is asked for. Of the process: a merge works on a thread of its own.
_cache: Path | None = None


@contextmanager
def cached_in(folder: Path | None) -> Iterator[None]:
    """Inside, models of the hub are kept in this folder; None leaves that to huggingface_hub."""
    global _cache
    before, _cache = _cache, folder
    try:
        yield
    finally:
        _cache = before


def locate(reference: str) -> Path:
    """The folder or file that a reference means; a local path wins over a hub id of the same name.

    Hub ids ("owner/name" or "owner/name@revision") go through huggingface_hub with its usual
    environment: its cache, token, HF_HUB_OFFLINE. Raises CheckpointError that says what was looked
        for.
    """
    path = local_path(reference)
    try:
        check_searchable(path or Path(reference).expanduser())
    except RuntimeError:  # no such user's home
        pass
    if path is not None:
        return path
    if not _HUB_ID.fullmatch(reference) or reference.endswith(
        (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
    ):
        raise CheckpointError(
            f"model {reference!r} does not exist; give a folder, a .safetensors, .bin, .pt, .pth or"
            " .ckpt file, or a hub id such as 'owner/name'"
        )
    return _snapshot(reference)


def split_adapter(
    reference: str, exists: Callable[[str], object] | None = None
) -> tuple[str, str] | None:
    """(base, adapter) of `base+adapter`; None where the reference is a local path itself, or names
    no adapter.

    exists: whether there is such a path; by default from the working directory. A path may hold a
    plus too: the first cut that leaves the most paths that exist is meant.
    """
    there = exists or local_path
    if not 0 < reference.count("+") <= _MOST_PLUSES or there(reference):
        return None
    places = [at for at, letter in enumerate(reference) if letter == "+"]
    cuts = [(reference[:at], reference[at + 1 :]) for at in places]
    return max(cuts, key=lambda cut: sum(bool(there(part)) for part in cut))


def local_path(reference: str) -> Path | None:
    """The path that a reference is, where there is something. CheckpointError where the system does
    not say: a model of that name on the hub is another one.
    """
    try:
        path = Path(reference).expanduser()
    except RuntimeError:  # no such user's home
        return None
    return path if reference and is_there(path) else None


def _snapshot(reference: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"model {reference!r} is not a folder here, and hub ids need huggingface_hub; "
            "pip install huggingface_hub, or give a folder"
        ) from None
    name, _, revision = reference.partition("@")
    _LOG.info("%s: from the hub or its cache", reference)

    def fetch(patterns: list[str]) -> Path:
        place: dict[str, Any] = {} if _cache is None else {"cache_dir": _cache}
        found = snapshot_download(name, revision=revision or None, allow_patterns=patterns, **place)
        return Path(str(found))

    try:
        folder = fetch([*_SMALL_FILES, "model.safetensors"])
        if not (folder / "model.safetensors").exists():
            shards = _shards(folder / "model.safetensors.index.json")
            other = _shards(folder / "pytorch_model.bin.index.json") or ["pytorch_model.bin"]
            if not shards and (folder / "adapter_config.json").exists():
                other = ["adapter_model.safetensors", "adapter_model.bin"]
            fetch(shards or other)
        modules = module_folders(folder)
        for name in MODULE_WEIGHTS:  # the second only of modules that lack the first
            wanted = [path for path in modules if path not in with_weights(folder)]
            if wanted:
                fetch([f"{path}/{name}" for path in wanted])
    except Exception as error:  # of many kinds: HTTP, validation, cache, offline
        raise CheckpointError(
            f"model {reference!r} is neither a folder here nor to be had from the hub:"
            f" {_why_not(error)}"
        ) from None
    return folder


# By the names of huggingface_hub's classes, the more special ones first.
_REASONS = {
    "GatedRepoError": "access to it is granted on its page; ask for it there, and log in (hf auth"
    " login)",
    "RepositoryNotFoundError": "there is none of that name that may be read; check the name, or log"
    " in (hf auth login) if it is private",
    "RevisionNotFoundError": "it has no such revision; check what stands after the '@'",
}


def _why_not(error: Exception) -> str:
    from huggingface_hub import constants

    kinds = [kind.__name__ for kind in type(error).__mro__]
    for name, reason in _REASONS.items():
        if name in kinds:
            return reason
    if constants.HF_HUB_OFFLINE:
        return (
            "HF_HUB_OFFLINE is set, and it is not in the hub's cache; check the name, unset"
            " HF_HUB_OFFLINE, or give a folder"
        )
    if "LocalEntryNotFoundError" in kinds:
        return (
            "the hub cannot be reached from here, and it is not in the hub's cache; check the name"
            " and the network, or give a folder"
        )
    said = str(error).strip().splitlines()
    return f"{said[0].rstrip('.:') if said else type(error).__name__}; check the name"


def _shards(index: Path) -> list[str]:
    """The files that an index names; they are checked when the folder is read."""
    try:
        weights = read_json(index, MAX_INDEX)["weight_map"]
        return sorted({str(file) for file in weights.values()})
    except (CheckpointError, KeyError, AttributeError):
        return []
