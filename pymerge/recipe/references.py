"""Models as a recipe names them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Any

from pymerge.checkpoint.files import is_there
from pymerge.checkpoint.hub import split_adapter
from pymerge.methods.method import kind_of, short


@dataclass(frozen=True)
class ModelReference:
    """A model as a recipe names it: a local path or a hub id, a revision of the latter, and an
    adapter on top of it.
    """

    path: str
    revision: str | None = None
    adapter: ModelReference | None = None

    def __str__(self) -> str:
        own = self.path if self.revision is None else f"{self.path}@{self.revision}"
        return own if self.adapter is None else f"{own}+{self.adapter}"


def find_local(text: str, folder: FilePath | None) -> FilePath | None:
    """The file or folder of that name, relative to the working directory, else to the
    configuration's folder. CheckpointError where the system does not say.
    """
    for start in (FilePath(), *([] if folder is None else [folder])):
        try:
            path = start / FilePath(text).expanduser()
        except RuntimeError:  # no such user's home
            continue
        if text and is_there(path):
            return path
    return None


def parse_reference(raw: Any, folder: FilePath | None = None) -> ModelReference:
    """A model reference from text ("path", "id@revision", two of these with a plus between them) or
    {model: {path, revision}, lora: ...}. ValueError with the reason.
    """
    if isinstance(raw, ModelReference):
        return raw
    if isinstance(raw, FilePath):
        return ModelReference(str(raw))
    if isinstance(raw, Mapping):
        return _reference_from_mapping(raw, folder)
    if not isinstance(raw, str) or not raw.strip():
        raise ValueError(
            f"{short(raw)} is {kind_of(raw) if raw != '' else 'empty'}; pass a path or a hub id"
        )
    if find_local(raw, folder) is not None:
        return ModelReference(raw)
    if "+" in raw:
        return _with_adapter(raw, folder)
    if raw.count("@") > 1:
        raise ValueError(f"{short(raw)} has more than one '@'; write path@revision")
    path, _, revision = raw.partition("@")
    if not path or ("@" in raw and not revision):
        raise ValueError(f"{short(raw)} is not path@revision")
    return _of_hub(path, revision or None, folder)


def _of_hub(path: str, revision: str | None, folder: FilePath | None) -> ModelReference:
    """A revision is one of the hub's, so that a local path has none."""
    local = revision is not None and find_local(path, folder) is not None
    return ModelReference(path, None if local else revision)


def unused_revision(raw: Any, folder: FilePath | None) -> str | None:
    """The local path of a reference that names a revision too, which has no effect then."""
    if isinstance(raw, Mapping):
        path, revision = raw.get("path"), raw.get("revision")
    elif isinstance(raw, str) and "+" not in raw and find_local(raw, folder) is None:
        path, _, revision = raw.partition("@")
    else:
        return None
    if not isinstance(path, str) or not revision or find_local(path, folder) is None:
        return None
    return path


def _with_adapter(raw: str, folder: FilePath | None) -> ModelReference:
    """`base+adapter`."""

    def exists(text: str) -> bool:
        return find_local(text, folder) is not None

    base, adapter = split_adapter(raw, exists) or ("", "")
    if not base or not adapter:
        raise ValueError(f"{short(raw)} is not base+adapter, two paths or hub ids")
    if any("+" in part and not exists(part) for part in (base, adapter)):
        raise ValueError(
            f"{short(raw)} has more than one '+'; a model takes one adapter, so write"
            " base+adapter, and merge several of these"
        )
    return replace(parse_reference(base, folder), adapter=parse_reference(adapter, folder))


def _reference_from_mapping(raw: Mapping[str, Any], folder: FilePath | None) -> ModelReference:
    for key in raw:
        if key not in ("model", "lora", "override_architecture"):
            raise ValueError(
                f"unknown key {short(key)}; a model in this form has 'model', and 'lora' for an"
                " adapter"
            )
    found = _path_of(raw.get("model"), folder)
    if raw.get("lora") is None:
        return found
    if found.adapter is not None:
        raise ValueError("'model' has an adapter already; remove it there, or remove 'lora'")
    return replace(found, adapter=_path_of(raw["lora"], folder))


def _path_of(inner: Any, folder: FilePath | None) -> ModelReference:
    if not isinstance(inner, Mapping):
        return parse_reference(inner, folder)
    for key in inner:
        if key not in ("path", "revision"):
            raise ValueError(f"unknown key {short(key)}; a model path has 'path' and 'revision'")
    path, revision = inner.get("path"), inner.get("revision")
    if not isinstance(path, str) or not path:
        raise ValueError(f"path: {short(path)} is {kind_of(path)}; pass a path or a hub id")
    if revision is not None and not isinstance(revision, str):
        raise ValueError(f"revision: {short(revision)} is {kind_of(revision)}; pass text")
    return _of_hub(path, revision, folder)
