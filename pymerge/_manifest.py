"""The manifest of a merge: what it was made of, for people, and for a later run that wants to go on with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pymerge import __version__
from pymerge.checkpoint.folder import OutputFolder
from pymerge.checkpoint.layout import Shard
from pymerge.checkpoint.reader import OpenModel
from pymerge.checkpoint.writer import translated
from pymerge.errors import OutputError
from pymerge.plan import MergeRecipe
from pymerge.planner import Plan


def new_manifest(
    recipe: MergeRecipe,
    plan: Plan,
    models: Sequence[OpenModel],
    shards: Sequence[Shard],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Before the first file is made. options: those of the call that the bytes of the output depend on."""
    inputs = [
        {
            "model": model.reference,
            "files": [{"name": file.path.name, **file.identity.lasting} for file in model.files],
        }
        for model in models
    ]
    # Whatever the bytes of the output depend on.
    whole = repr((__version__, plan.tensors, inputs, [(s.file, s.header) for s in shards]))
    return {
        "format": 1,
        "pymerge": __version__,
        "fingerprint": hashlib.sha256(whole.encode()).hexdigest(),
        "recipe": recipe.text,
        "options": dict(options),
        "inputs": inputs,
        "tensors": len(plan.tensors),
        "parameters": plan.parameters,
        "outputs": {},
    }


def finished_files(
    folder: OutputFolder, manifest: Mapping[str, Any], shards: Sequence[Shard], notes: list[str]
) -> dict[str, dict[str, Any]]:
    """The finished files, with matching hashes, of an interrupted merge that was the same as this one.

    Raises OutputError that says what differs where it was another one; nothing is touched then.
    """
    earlier = folder.progress()
    outputs = earlier.get("outputs")
    if not isinstance(outputs, dict) or not outputs:
        notes.append(f"there was nothing to resume of {folder.out}: all of it was made")
        return {}
    if earlier.get("fingerprint") != manifest["fingerprint"]:
        raise OutputError(
            f"the interrupted merge into {folder.out} was another one: {_differences(earlier, manifest)}. What it "
            f"finished is kept, in {folder.partial}: resume it as it was, or start anew without --resume (resume=False), "
            "which deletes that"
        )
    done = {}
    for shard in shards:
        path = folder.partial / shard.file
        entry = outputs.get(shard.file)
        if not isinstance(entry, dict) or "methods" not in entry:
            continue
        if (
            path.is_file()
            and path.stat().st_size == shard.nbytes
            and _sha256(path) == entry.get("sha256")
        ):
            done[shard.file] = entry
        else:
            notes.append(f"{shard.file} of the interrupted merge was damaged, and was made again")
    return done


def _differences(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """In words, the earlier value first."""
    found = []
    if earlier.get("pymerge") != now["pymerge"]:
        found.append(f"it was made by pymerge {earlier.get('pymerge')}, this is {now['pymerge']}")
    before = earlier.get("options")
    for name, value in now["options"].items():
        was = before.get(name) if isinstance(before, dict) else None
        if was != value:
            found.append(f"{name} was {was} and is {value}")
    found += _changed_lines(str(earlier.get("recipe")), now["recipe"])
    inputs = earlier.get("inputs")
    known = {
        str(entry.get("model")): entry.get("files")
        for entry in (inputs if isinstance(inputs, list) else [])
        if isinstance(entry, dict)
    }
    for entry in now["inputs"]:
        if entry["model"] in known and known[entry["model"]] != entry["files"]:
            found.append(f"files of {entry['model']} changed since")
        elif entry["model"] not in known:
            found.append(f"{entry['model']} was not among its models")
    return "; ".join(found) or "the tensors that it was to make differ"


def _changed_lines(before: str, after: str) -> list[str]:
    old, new = (text.splitlines() for text in (before, after))
    gone = [line.strip() for line in old if line not in new]
    come = [line.strip() for line in new if line not in old]
    if old == new:
        return []
    words = [f"{verb} {lines[0]!r}" for verb, lines in (("had", gone), ("has", come)) if lines]
    return [f"the recipe {' and now '.join(words) or 'has other entries'}"]


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """As it is written to a file."""
    return json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"


def _sha256(path: Any) -> str:
    sha = hashlib.sha256()
    with translated(path), path.open("rb") as file:
        while piece := file.read(4 << 20):
            sha.update(piece)
    return sha.hexdigest()
