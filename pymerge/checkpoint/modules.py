"""Which modules a model keeps in folders of their own, with weights beside the model's: what
modules.json of sentence-transformers lists (`2_Dense/`).
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from pymerge.checkpoint.files import MAX_CONFIG, exists, parse_object, read_file
from pymerge.errors import CheckpointError

MODULES = "modules.json"
# In the order in which sentence-transformers looks for them.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_MOST = 64  # modules; a model has three to five
_DEEPEST = 8  # folders in folders; honest ones lie in one


def module_folders(folder: Path | None) -> list[str]:
    """The folders in a model's own, relative to it, that its list of modules names; none where
    there is no list that can be read.
    """
    if folder is None or not exists(folder / MODULES):
        return []
    try:
        content = read_file(folder / MODULES, MAX_CONFIG).removeprefix(b"\xef\xbb\xbf")
        listed = parse_object(b'{"modules": ' + content + b"}", folder / MODULES)["modules"]
    except CheckpointError:
        return []
    found: dict[str, None] = {}
    for entry in listed[:_MOST] if isinstance(listed, list) else []:
        path = entry.get("path") if isinstance(entry, dict) else None
        if not isinstance(path, str) or not path.isprintable() or "\\" in path or ":" in path:
            continue
        parts = PurePosixPath(path).parts
        if not 0 < len(parts) <= _DEEPEST or path.startswith("/"):
            continue
        if not any(part.startswith(".") for part in parts):
            found["/".join(parts)] = None
    return list(found)


def with_weights(folder: Path | None) -> list[str]:
    """Those of them in which weights lie."""
    return [
        path
        for path in module_folders(folder)
        if folder is not None and any(exists(folder / path / name) for name in WEIGHTS)
    ]
