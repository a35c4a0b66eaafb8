"""Folders that somebody has a hand in while a merge runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from folder_cases import assert_same, expected, family, read_result

SHARD = 1500
Act = Callable[[Path], object]


def partial(out: Path) -> Path:
    return out.with_name(f".{out.name}.pymerge-partial")


def during(act: Callable[[], object], at: int = 5) -> Callable[..., None]:
    """A progress callback that does something once, in the middle of the merge."""
    seen: list[str] = []

    def progress(done: int, total: int, name: str) -> None:
        seen.append(name)
        if len(seen) == at:
            act()

    return progress


def tree(folder: Path) -> dict[str, str]:
    """Every entry with its content, links by where they lead."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = f"-> {path.readlink()}"
        elif path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes().hex()
        else:
            found[str(path.relative_to(folder))] = "folder" if path.is_dir() else "other"
    return found


def is_result(folder: Path, config: Any) -> None:
    assert_same(read_result(folder), expected(config, family(dtype=torch.float32)))
    assert {"config.json", "README.md", "pymerge_manifest.json"} <= set(tree(folder))
    assert not (folder / ".lock").exists()


def folder_with(*files: str) -> Act:
    def make(path: Path) -> None:
        for file in files:
            (path / file).parent.mkdir(parents=True, exist_ok=True)
            (path / file).write_text(f"mine: {file}")

    return make
