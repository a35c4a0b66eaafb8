"""Tokens added to the files of a tokenizer, as data (docs/spec/rows.md, V9): tokenizer.json and the
files beside it that list added tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pymerge.checkpoint.files import MAX_TOKENIZER, as_json, parse_object
from pymerge.errors import CheckpointError
from pymerge.messages.words import some_names
from pymerge.planning.plan import TokenizerChanges

_MAIN, _CONFIG, _OLDER = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"


def change_tokens(files: dict[str, bytes], changes: TokenizerChanges) -> list[str]:
    """Add and drop tokens in `files`, name -> content; returns what is impossible."""
    try:
        whole = _read(files, _MAIN)
        if whole is None:
            return [f"{_MAIN} is not copied, so that no tokens can be added to it"]
        problems = list(_dropped(whole, changes.dropped))
        listed = {each.content: each for each, _ in changes.added}
        kept = [
            entry for entry in whole.get("added_tokens") or [] if entry["content"] not in listed
        ]
        new = [{"id": number, **asdict(each)} for each, number in changes.added]
        whole["added_tokens"] = sorted(kept + new, key=lambda entry: int(entry["id"]))
        made = {_MAIN: whole}
        config = _read(files, _CONFIG)
        decoder = config.get("added_tokens_decoder") if config is not None else None
        if config is not None and isinstance(decoder, dict):
            entries = {k: v for k, v in decoder.items() if _content(v) not in changes.dropped}
            entries |= {str(number): asdict(each) for each, number in changes.added}
            made[_CONFIG] = {**config, "added_tokens_decoder": entries}
        older = _read(files, _OLDER)
        if older is not None:
            ids = {token: i for token, i in older.items() if token not in changes.dropped}
            made[_OLDER] = ids | {each.content: number for each, number in changes.added}
        for name, content in made.items():
            files[name] = as_json(content)
    except (CheckpointError, KeyError, TypeError, ValueError, RecursionError) as error:
        return [f"no tokens can be added to the tokenizer of the result ({error})"]
    return problems


def _read(files: dict[str, bytes], name: str) -> dict[str, Any] | None:
    return parse_object(files[name], Path(name), MAX_TOKENIZER) if name in files else None


def _content(entry: Any) -> Any:
    return entry.get("content") if isinstance(entry, dict) else entry


def _dropped(whole: dict[str, Any], dropped: Collection[str]) -> Iterator[str]:
    """Remove tokens from tokenizer.json, with the merges that make or use them. A problem where the
    tokenizer puts one into every text.
    """
    if not dropped:
        return
    used = set(_texts(whole.get("post_processor"))) & set(dropped)
    if used:
        yield (
            f"the tokenizer puts {some_names(sorted(used))} into every text, for which its own"
            " model has no row; choose another tokenizer_source"
        )
    whole["added_tokens"] = [e for e in whole["added_tokens"] if e["content"] not in dropped]
    model = whole["model"]
    if isinstance(model["vocab"], list):
        model["vocab"] = [entry for entry in model["vocab"] if entry[0] not in dropped]
        return
    model["vocab"] = {t: i for t, i in model["vocab"].items() if t not in dropped}
    if model.get("merges"):
        pairs = ((m, m.split(" ") if isinstance(m, str) else m) for m in model["merges"])
        model["merges"] = [
            merge
            for merge, pair in pairs
            if "".join(pair) not in dropped and not any(part in dropped for part in pair)
        ]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for key in value:
            yield from _texts(value[key] if isinstance(value, dict) else key)
        if isinstance(value, dict):
            yield from value
