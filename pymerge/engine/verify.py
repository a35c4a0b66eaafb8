"""Checks that a merged folder matches its manifest and that transformers loads and runs it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymerge.checkpoint import schemas
from pymerge.checkpoint.adapter import is_adapter, open_adapter
from pymerge.checkpoint.adapter_config import CONFIG as ADAPTER
from pymerge.checkpoint.adapter_config import read_vector_config
from pymerge.checkpoint.contents import MANIFEST
from pymerge.checkpoint.files import (
    MAX_INDEX,
    check_searchable,
    exists,
    is_file,
    is_folder,
    open_regular,
    read_file,
    reason,
)
from pymerge.checkpoint.identity import FileIdentity
from pymerge.checkpoint.memory import is_remote
from pymerge.checkpoint.reader import open_model
from pymerge.errors import CheckpointError, MergeError
from pymerge.interrupt import check
from pymerge.messages.words import counted, some_names

_PIECE = 8 << 20
# Memory of the subprocess: torch and transformers take 1 GB of data, and the weights exist up to
# twice while they are loaded, mapped and copied.
LIBRARIES = 4 << 30
_COPIES = 3
# Without the working directory in sys.path.
_PROGRAM = (
    "import sys; sys.path[:] = filter(None, sys.path);"
    " from pymerge.engine.loading import main; main(*sys.argv[1:])"
)


@dataclass(frozen=True)
class Verification:
    """done: sentences on what was found right. problems: on what was found wrong."""

    done: tuple[str, ...]
    problems: tuple[str, ...]


def verify_folder(folder: Path, libraries: int = LIBRARIES) -> Verification:
    """Check the hashes of a merged folder against its manifest, then load it with transformers and
    run it, offline and in a process of its own, whose memory is bounded by the size of the weights
    and `libraries` bytes for torch and transformers.

    Weights whose hashes are wrong are not loaded. Raises CheckpointError where there is no folder
    or no manifest.
    """
    manifest = _manifest(folder)
    before = _identities(folder, manifest)
    problems = _weights(folder, manifest)
    done = [] if problems else [_of_weights(len(manifest["outputs"]))]
    others = _others(folder, manifest)
    if not problems and exists(folder / ADAPTER):
        done.append(_of_adapter(folder))
    elif not problems:
        size = sum(int(entry["bytes"]) for entry in manifest["outputs"].values())
        found = _load(folder, _COPIES * size + libraries)
        done += found["done"]
        problems = found["problems"]
    changed = _changed(before, _identities(folder, manifest), remote=is_remote(folder))
    if changed:  # whatever was found is of no one version
        return Verification(
            (), (f"{some_names(changed)} changed meanwhile; verify again when nothing writes",)
        )
    return Verification(tuple(done), (*others, *problems))


def _identities(folder: Path, manifest: Mapping[str, Any]) -> dict[str, FileIdentity | None]:
    """Of every file that the merge wrote, None where there is none."""
    found: dict[str, FileIdentity | None] = {}
    for name in (*manifest["outputs"], *_small(manifest)):
        try:
            found[name] = FileIdentity.of((folder / name).stat())
        except (OSError, ValueError):
            found[name] = None
    return found


def _changed(
    before: Mapping[str, FileIdentity | None],
    after: Mapping[str, FileIdentity | None],
    *,
    remote: bool,
) -> list[str]:
    return [
        name
        for name, old in before.items()
        if (new := after[name]) is None or old is None or old.what_changed(new, remote=remote)
        if new is not old  # both are missing
    ]


def _small(manifest: Mapping[str, Any]) -> list[str]:
    """The names of the small files that the merge wrote."""
    files = manifest.get("files")
    written = [*(map(str, files) if isinstance(files, list) else ()), *_hashes(manifest)]
    return list(dict.fromkeys(written))


def _hashes(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    copied = manifest.get("copied")
    return copied if isinstance(copied, dict) else {}


def _manifest(folder: Path) -> Mapping[str, Any]:
    check_searchable(folder)
    if not is_folder(folder):
        raise CheckpointError(f"{folder} is no folder; name one that `pymerge merge` made")
    path = folder / MANIFEST
    if not is_file(path):
        raise CheckpointError(
            f"{folder} has no {MANIFEST}, by which it is verified; name a folder that `pymerge"
            " merge` made"
        )
    try:
        return schemas.manifest(read_file(path, MAX_INDEX), path)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; merge again, or verify with the release that made it"
        ) from None


def _weights(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    problems = []
    outputs = manifest["outputs"]
    for name, entry in outputs.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != entry["bytes"] or _sha256(path) != entry["sha256"]:
                problems.append(f"{name} is not what the merge wrote; merge again")
        except (OSError, ValueError) as error:
            problems.append(f"{name} {reason(error)}; merge again")
    strays = {path.name for path in folder.glob("*.safetensors")} - outputs.keys()
    if strays:
        problems.append(
            f"{some_names(sorted(strays))}: weights that the merge did not write; move them away"
        )
    return problems


def _of_weights(count: int) -> str:
    files = "1 weight file is" if count == 1 else f"{count} weight files are"
    return f"{files} as {MANIFEST} says (SHA-256)"


def _of_adapter(folder: Path) -> str:
    """An adapter is not loaded, which would take its base. Raises CheckpointError."""
    if is_adapter(folder) and read_vector_config(folder) is not None:
        vectors = open_model(str(folder))
        vectors.close()
        return f"the {counted(len(vectors.tensors), 'tensor')} of the (IA)^3 adapter can be read"
    updates = open_adapter(str(folder)).updates
    return f"the {counted(len(updates), 'update')} of the adapter fit its {ADAPTER}"


def _others(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """The small files that are missing or have changed."""
    gone = [name for name in _small(manifest) if not is_file(folder / name)]
    changed = []
    for name, sha256 in _hashes(manifest).items():
        try:
            if name not in gone and _sha256(folder / name) != sha256:
                changed.append(name)
        except (OSError, ValueError):
            gone.append(name)
    problems = []
    if gone:
        problems.append(f"{some_names(gone)}: written by the merge, and not there; merge again")
    if changed:
        problems.append(f"{some_names(changed)}: not what the merge wrote; merge again")
    return problems


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while piece := file.read(_PIECE):
            check()
            digest.update(piece)
    return digest.hexdigest()


def _load(folder: Path, memory: int) -> dict[str, list[str]]:
    command = [sys.executable, "-c", _PROGRAM, str(folder.resolve()), str(memory)]
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    quiet = {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    made = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, **offline, **quiet},
    )
    lines = made.stdout.strip().splitlines()
    try:
        if made.returncode == 0:
            found: dict[str, list[str]] = json.loads(lines[-1])
            return found
    except (IndexError, ValueError):
        pass
    why = made.stderr.strip().splitlines()
    last = why[-1] if why else f"status {made.returncode}"
    if made.returncode < 0:
        last = f"signal {-made.returncode}: it may have run out of memory"
    return {
        "done": [],
        "problems": [f"the process that loads it with transformers ended ({last[:300]})"],
    }


def raise_problems(found: Verification, folder: Path) -> None:
    """Raise MergeError where problems were found."""
    if found.problems:
        raise MergeError([f"{folder}: {problem}" for problem in found.problems])
