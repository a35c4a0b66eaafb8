"""The manifest of a merge: its inputs and settings, for people and for a later `resume`."""

from __future__ import annotations

import hashlib
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pymerge.checkpoint.contents import MANIFEST, MANIFEST_FORMAT
from pymerge.checkpoint.folder import OutputFolder
from pymerge.checkpoint.layout import Shard
from pymerge.checkpoint.reader import OpenModel
from pymerge.engine.card import ShortNames
from pymerge.errors import CheckpointError, OutputError
from pymerge.messages.arguments import argument
from pymerge.planning.plan import Plan
from pymerge.recipe.model import MergeRecipe
from pymerge.version import __version__


def new_manifest(
    recipe: MergeRecipe,
    plan: Plan,
    models: Sequence[OpenModel],
    shards: Sequence[Shard],
    files: Iterable[str],
    copied: Mapping[str, bytes],
    options: Mapping[str, Any],
    *,
    full_paths: bool = False,
) -> dict[str, Any]:
    """The manifest, before the first file is made.

    files: what is written beside the weights. copied: those of them that come from models, by which
        a later merge knows what it may replace. options: arguments of the call that affect the
        bytes of the output. full_paths: keep the models' local paths; otherwise only as many last
        components as tell them apart.
    """
    inputs = inputs_of(models)
    # Hashed one after the other, since everything that the output's bytes depend on may be large.
    fingerprint = hashlib.sha256()
    for part in (__version__, inputs, *plan.tensors):
        fingerprint.update(f"{part!r}\n".encode())
    for shard in shards:
        fingerprint.update(f"{shard.file!r} {len(shard.header)}\n".encode())
        fingerprint.update(shard.header)
    names = ShortNames((*recipe.models, *recipe.statistics))
    for entry in [] if full_paths else inputs:
        entry["model"] = names.of(str(entry["model"]))
    return {
        "format": MANIFEST_FORMAT,
        "pymerge": __version__,
        "fingerprint": fingerprint.hexdigest(),
        "recipe": recipe.text if full_paths else names.recipe(recipe.text),
        "options": dict(options),
        "inputs": inputs,
        "tensors": len(plan.tensors),
        "parameters": plan.parameters,
        "outputs": {},
        "files": sorted(files),
        "copied": {name: hashlib.sha256(copied[name]).hexdigest() for name in sorted(copied)},
    }


def inputs_of(models: Sequence[OpenModel]) -> list[dict[str, Any]]:
    """The models' references, and their files with what changes where a file does."""
    return [
        {
            "model": model.reference,
            "files": [{"name": file.path.name, **file.identity.lasting} for file in model.files],
        }
        for model in models
    ]


def _earlier(folder: OutputFolder) -> dict[str, Any] | None:
    """The checked manifest of the merge that was interrupted here; None without one. OutputError
    for a damaged one.
    """
    text = folder.manifest()
    if text is None:
        return None
    from pymerge.checkpoint import schemas

    path = folder.partial / MANIFEST
    kept = (
        f"What that merge finished is kept, in {folder.partial}; start anew without"
        f" {argument('resume', True)}, which deletes it"
    )
    try:
        return schemas.manifest(text, path)
    except CheckpointError as error:
        raise OutputError(f"{error}. {kept}") from None


def finished_files(
    folder: OutputFolder,
    manifest: Mapping[str, Any],
    plan: Plan,
    shards: Sequence[Shard],
    notes: list[str],
) -> dict[str, dict[str, Any]]:
    """The finished files, with matching hashes, of an interrupted merge that was the same as this
    one.

    Raises OutputError that says what differs where it was another one, or that its manifest is
        damaged; nothing is touched then.
    """
    earlier = _earlier(folder)
    if earlier is None or not earlier["outputs"]:
        notes.append(
            f"there was nothing to resume; the merge into {folder.out} was done from the beginning"
        )
        return {}
    if earlier["fingerprint"] != manifest["fingerprint"]:
        raise OutputError(
            f"the interrupted merge into {folder.out} was another one:"
            f" {_differences(earlier, manifest)}. What it finished is kept, in {folder.partial}:"
            f" resume it as it was, or start anew without {argument('resume', True)}, which deletes"
            " that"
        )
    outputs = earlier["outputs"]
    done = {}
    for shard in shards:
        entry = outputs.get(shard.file)
        if entry is None or "methods" not in entry:
            continue
        made = {plan.tensors[index].name for index in shard.tensors}
        if (
            made.issuperset(report["name"] for report in entry.get("reports", ()))
            and folder.sha256(shard.file, shard.nbytes) == entry["sha256"]
        ):
            done[shard.file] = entry
        else:
            notes.append(f"{shard.file} of the interrupted merge was damaged, and was made again")
    return done


def _differences(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two merges, in words, the earlier value first."""
    found = []
    if earlier["pymerge"] != now["pymerge"]:
        found.append(f"it was made by pymerge {earlier['pymerge'][:40]}, this is {now['pymerge']}")
    before = earlier["options"]
    for name, value in now["options"].items():
        if name not in before or before[name] != value:
            was, now_is = _in_words(name, before.get(name)), _in_words(name, value)
            found.append(f"{argument(name)} was {was} and is {now_is}")
    names = ShortNames()
    found += _changed_lines(*(names.recipe(m["recipe"]) for m in (earlier, now)))
    files: dict[str, list[Any]] = {}  # by short name, which several models may share
    for entry in earlier["inputs"]:
        files.setdefault(names.of(entry["model"]), []).append(entry["files"])
    for entry in now["inputs"]:
        name = names.of(entry["model"])
        if name not in files:
            found.append(f"{entry['model']} was not among its models")
        elif entry["files"] not in files[name]:
            found.append(f"files of {entry['model']} changed since")
    return "; ".join(found) or (
        "its models lie in other folders or in another order, or the tensors that it was to make"
        " differ"
    )


def _in_words(name: str, value: Any) -> str:
    if name == "out_shard_size":
        if type(value) is int:
            return f"{value} bytes"
        if isinstance(value, str) and re.fullmatch(r"[0-9]{1,20} parameters", value):
            return value
    return reprlib.repr(value)


def _changed_lines(before: str, after: str) -> list[str]:
    old, new = (text.splitlines() for text in (before, after))
    gone = [line.strip() for line in old if line not in new]
    come = [line.strip() for line in new if line not in old]
    if old == new:
        return []
    words = [f"{verb} {lines[0][:80]!r}" for verb, lines in (("had", gone), ("has", come)) if lines]
    return [f"the recipe {' and now '.join(words) or 'has other entries'}"]
