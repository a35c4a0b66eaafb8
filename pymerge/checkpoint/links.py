"""Which small files of a model folder are its own: links out of the folder are not copied into a
result.

A folder from elsewhere can hold `tokenizer_config.json -> ../../secret`, and a merge that copied it
would publish the secret. Links to weights are followed: their content must be tensors.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from pymerge.checkpoint.files import is_folder
from pymerge.messages.words import some_names


def own_files(folder: Path, paths: Iterable[Path]) -> tuple[list[Path], list[str]]:
    """(the files among `paths` that may be copied, notes on the others). paths: files or links in
    `folder`.
    """
    kept: list[Path] = []
    away: list[str] = []
    for path in paths:
        name = path.relative_to(folder).as_posix()
        if leads_out(path, folder):
            away.append(name)
        else:
            kept.append(path)
    if not away:
        return kept, []
    note = (
        f"{folder}: {some_names(away)} {_are(away, 'is', 'are')} not copied, since"
        f" {_are(away, 'it is a link', 'they are links')} out of the folder; copy the content into"
        " it where the result is to have it"
    )
    return kept, [note]


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a file, links followed, is outside the folder and not a blob of a repository in the
    hub's cache.

    The folder may itself be a link. The hub's cache has REPOSITORY/snapshots/REVISION/FILE ->
    REPOSITORY/blobs/HASH.
    """
    target = Path(os.path.realpath(path))  # does not raise for links in a circle
    if target.is_relative_to(folder.resolve()):
        return False
    blobs = target.parent
    return not (blobs.name == "blobs" and is_folder(blobs.parent / "snapshots"))


def _are(names: Sequence[str], one: str, many: str) -> str:
    return one if len(names) == 1 else many
