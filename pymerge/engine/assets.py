"""Everything in a model folder beside the weights: configs, tokenizer, model card.

All of it is read and made into the bytes to be written before a merge begins, so that nothing of it
can fail at the end.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymerge.checkpoint.contents import _CONFIGS, _TOKENIZER, ASSETS, CONFIG
from pymerge.checkpoint.files import MAX_TOKENIZER, exists, parse_object, read_bounded, reason
from pymerge.checkpoint.links import own_files
from pymerge.checkpoint.reader import OpenModel
from pymerge.errors import CheckpointError
from pymerge.planning.plan import Plan, Vocabulary
from pymerge.recipe.model import MergeRecipe

_MOST = 256 << 20  # bytes of all of them; the largest tokenizers have a tenth of that


@dataclass(frozen=True)
class Assets:
    """files: name -> content. sources: what was read. notes: what is left out. problems: what
    cannot be read or written.
    """

    files: Mapping[str, bytes]
    sources: tuple[Path, ...]
    notes: tuple[str, ...]
    problems: tuple[str, ...]


def collect_assets(recipe: MergeRecipe, plan: Plan, models: Sequence[OpenModel]) -> Assets:
    """All of it but the model card. What the source folder lacks is left out."""
    main = models[recipe.base or 0]
    speaker = models[recipe.tokenizer] if recipe.tokenizer is not None else main
    files: dict[str, bytes] = {}
    sources: list[Path] = []
    notes: list[str] = []
    problems: list[str] = []
    held = 0
    wanted = [(main, (CONFIG, *_CONFIGS)), (speaker, _TOKENIZER)]
    if speaker is main:
        wanted = [(main, (CONFIG, *ASSETS))]
    for model, patterns in wanted:
        if model.folder is None:
            continue
        found = list(_matching(model.folder, patterns))
        sources += found
        own, left_out = own_files(model.folder, found)
        notes += left_out
        # One that is a link out of the folder is read, as weights are, and not written again.
        if model.folder / CONFIG in own and not plan.problems:
            try:
                files[CONFIG] = as_json(fixed_config(dict(main.header.config), plan))
            except (ValueError, RecursionError) as error:
                problems.append(f"{main.reference}: its {CONFIG} cannot be written again ({error})")
        for path in own:
            if path.name == CONFIG:
                continue
            try:
                content = read_bounded(path, MAX_TOKENIZER)
            except (OSError, ValueError) as error:
                problems.append(f"{path}: {reason(error)}; mend it, or move it away")
                continue
            held += len(content)
            if held > _MOST:
                problems.append(
                    f"{model.folder}: the small files that a merge copies have more than {_MOST}"
                    " bytes; move away what does not belong to the model"
                )
                break
            files[path.relative_to(model.folder).as_posix()] = content
    moved = plan.vocabulary.new_ids if plan.vocabulary is not None else {}
    if moved and "generation_config.json" in files:
        files["generation_config.json"] = _with_moved_ids(files["generation_config.json"], moved)
    if recipe.chat_template is not None:
        try:
            files["chat_template.jinja"] = recipe.chat_template.encode()
        except UnicodeEncodeError as error:
            half = recipe.chat_template[error.start]
            problems.append(
                f"chat_template holds U+{ord(half):04X}, half a surrogate pair, which is no"
                " character; remove it"
            )
    return Assets(files, tuple(sources), tuple(notes), tuple(problems))


def as_json(content: Any) -> bytes:
    """As it is written to a file. Half a surrogate pair, which UTF-8 has no bytes for, stays the
    escape that it was.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace")


def _matching(folder: Path, patterns: Sequence[str]) -> Iterator[Path]:
    """Names as they are listed, whatever they are; what a pattern matches where it is no folder."""
    for pattern in patterns:
        if "*" in pattern:
            yield from (path for path in sorted(folder.glob(pattern)) if not path.is_dir())
        elif exists(folder / pattern):
            yield folder / pattern


def fixed_config(config: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """config.json with the dtype of the result, its vocabulary and, where layers were taken apart,
    their number and kinds.
    """
    config.update(plan.config)
    if plan.dtype:
        _set_dtype(config, plan.dtype)
        if "dtype" not in config and "torch_dtype" not in config:
            config["torch_dtype"] = plan.dtype
    if plan.vocabulary is not None:
        _set_vocabulary(config, plan.vocabulary)
    return config


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            config[key] = dtype
        elif isinstance(value, dict) and key.endswith("_config") and key != "quantization_config":
            config[key] = dict(value)
            _set_dtype(config[key], dtype)


def _set_vocabulary(config: dict[str, Any], vocabulary: Vocabulary) -> None:
    """V7: the number of rows, and tokens by their new ids."""
    nested = config.get("text_config")
    if isinstance(nested, dict):
        config["text_config"] = dict(nested)
        _set_vocabulary(config["text_config"], vocabulary)
    if "vocab_size" in config or not isinstance(nested, dict):
        config["vocab_size"] = vocabulary.rows
    config.update(_with_new_ids(config, vocabulary.new_ids))


def _with_new_ids(config: Mapping[str, Any], new_ids: Mapping[int, int | None]) -> dict[str, Any]:
    """The entries that name tokens by their ids and change."""
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if not key.endswith(("_token_id", "_token_index")):
            continue
        if type(value) is int and value in new_ids:
            changed[key] = new_ids[value]
        elif isinstance(value, list) and any(v in new_ids for v in value if type(v) is int):
            moved = [new_ids.get(v, v) for v in value if type(v) is int]
            changed[key] = [v for v in moved if v is not None] or None
    return changed


def _with_moved_ids(content: bytes, new_ids: Mapping[int, int | None]) -> bytes:
    try:
        read = parse_object(content, Path("generation_config.json"))
        changed = _with_new_ids(read, new_ids)
        return as_json(read | changed) if changed else content
    except (CheckpointError, ValueError, RecursionError):  # as damaged as the original
        return content
