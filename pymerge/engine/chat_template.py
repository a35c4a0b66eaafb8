"""The chat template of the result: the one that most models have, and the files that hold it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pymerge.checkpoint.files import (
    MAX_CONFIG,
    MAX_TOKENIZER,
    as_json,
    exists,
    parse_object,
    read_bounded,
    reason,
)
from pymerge.checkpoint.links import own_files
from pymerge.checkpoint.reader import OpenModel
from pymerge.errors import CheckpointError
from pymerge.messages.words import some_names

_JINJA, _CONFIG, _PROCESSOR = "chat_template.jinja", "tokenizer_config.json", "chat_template.json"


def commonest(models: Iterable[OpenModel]) -> tuple[str | None, list[Path], list[str], list[str]]:
    """(the template that most of the models have, files that were read, notes, problems). Of
    several that as many have, the first.
    """
    having: dict[str, list[str]] = {}
    read: list[Path] = []
    notes: list[str] = []
    problems: list[str] = []
    for model in models:
        if model.folder is None:
            continue
        names = (name for name in (_JINJA, _CONFIG) if exists(model.folder / name))
        found = [model.folder / name for name in names][:1]
        own, left_out = own_files(model.folder, found)
        notes += left_out
        read += found
        try:
            text = next(filter(None, map(_template_in, own)), None)
        except (OSError, ValueError) as error:
            problems.append(f"{model.folder}: its chat template {reason(error)}; mend it")
            continue
        except CheckpointError as error:
            problems += error.problems
            continue
        if text is not None:
            having.setdefault(text, []).append(model.reference)
    if not having:
        if not problems:
            notes.append("chat_template: auto: none of the models has a template")
        return None, read, notes, problems
    text = max(having, key=lambda each: len(having[each]))  # the first of the largest
    if len(having) > 1:
        notes.append(
            f"chat_template: auto: that of {some_names(having[text])}; the models have"
            f" {len(having)} different ones"
        )
    return text, read, notes, problems


def _template_in(path: Path) -> str | None:
    """The template in a file; of several, the one called default."""
    if path.name == _JINJA:
        return read_bounded(path, MAX_CONFIG).decode("utf-8").strip() or None
    value = parse_object(read_bounded(path, MAX_TOKENIZER), path).get("chat_template")
    if isinstance(value, list):
        named = (each for each in value if isinstance(each, dict) and each.get("name") == "default")
        value = next(named, {}).get("template")
    return value.strip() or None if isinstance(value, str) else None


def set_template(files: dict[str, bytes], text: str) -> list[str]:
    """Write a template to chat_template.jinja, and to what else among `files` holds one, which an
    older transformers reads. Returns problems.
    """
    try:
        files[_JINJA] = text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        return [
            f"chat_template holds U+{ord(half):04X}, half a surrogate pair, which is no character;"
            " remove it"
        ]
    for name in (_CONFIG, _PROCESSOR):
        try:
            config = parse_object(files[name], Path(name), MAX_TOKENIZER) if name in files else {}
        except CheckpointError:  # as damaged as the original
            continue
        if "chat_template" in config:
            config["chat_template"] = _replaced(config["chat_template"], text)
            files[name] = as_json(config)
    return []


def _replaced(value: Any, text: str) -> Any:
    """Of templates by name, only the one called default is replaced."""
    if not isinstance(value, list):
        return text
    others = [e for e in value if not (isinstance(e, dict) and e.get("name") == "default")]
    return [{"name": "default", "template": text}, *others]
