"""When the tokenizer comes from another model than the config: the code that it needs, and its
special tokens in the configs (docs/spec/rows.md, V7).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pymerge.checkpoint.contents import GENERATION
from pymerge.checkpoint.files import (
    MAX_CONFIG,
    as_json,
    exists,
    parse_object,
    read_bounded,
    read_json,
)
from pymerge.checkpoint.tokens import Tokens
from pymerge.errors import CheckpointError
from pymerge.planning.plan import TokenizerChanges

_MODULE = re.compile(r"\w+(\.\w+)*")
# Nothing in it can match one stretch of text in two ways, which takes for ever in long ones.
_RELATIVE = re.compile(
    r"^[ \t]*from[ \t]*\.(?:(\w+)\b[\w.]*[ \t]+import|[ \t]*import[ \t]+(\w+))", re.M
)


def code_of(folder: Path, files: Mapping[str, bytes]) -> list[str]:
    """The modules that a tokenizer_config.json among `files` names in its auto_map, and those that
    they import, as far as the folder has them.
    """
    named = _json(files, "tokenizer_config.json").get("auto_map")
    left = [*_strings(named)]
    found: list[str] = []
    while left:
        module = left.pop().partition(".")[0]
        name = f"{module}.py"
        if not _MODULE.fullmatch(module) or name in found or not exists(folder / name):
            continue
        found.append(name)
        try:
            text = read_bounded(folder / name, MAX_CONFIG).decode("utf-8", "replace")
        except (OSError, ValueError):  # reported when it is copied
            continue
        left += [part for match in _RELATIVE.finditer(text) for part in match.groups() if part]
    return sorted(found)


def _strings(value: Any) -> Iterator[str]:
    """The class names of an auto_map entry: text, or a list of a slow and a fast class."""
    if isinstance(value, str):
        if "--" not in value:  # otherwise the code is in another repository
            yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _strings(each)
    elif isinstance(value, list):
        for each in value:
            yield from _strings(each)


class SpecialTokens:
    """End, beginning and padding token of a tokenizer, with their ids."""

    def __init__(
        self,
        folder: Path,
        files: Mapping[str, bytes],
        tokens: Tokens | None,
        rows: int | None,
        changes: TokenizerChanges | None,
    ) -> None:
        """folder: of its model. files: the tokenizer's among others. tokens: of that model, with
        `changes` in the result. rows: of the result.
        """
        self._folder = folder
        self._tokens: dict[str, tuple[int, str]] = {}  # entry of a config -> id and token
        config, older = (
            _json(files, name) for name in ("tokenizer_config.json", "special_tokens_map.json")
        )
        for key in ("eos_token", "bos_token", "pad_token"):
            value = config[key] if key in config else older.get(key)
            token = value.get("content") if isinstance(value, Mapping) else value
            if tokens is None or not isinstance(token, str):
                continue
            number = _id_of(token, tokens, changes)
            if number is not None and (rows is None or number < rows):
                self._tokens[f"{key}_id"] = number, token

    def set_in(self, files: dict[str, bytes]) -> list[str]:
        """Set the tokens in config.json and generation_config.json among `files`; returns notes on
        what changed. Other and damaged files are left alone.
        """
        changed: dict[str, list[str]] = {}
        for file in ("config.json", GENERATION):
            config = _json(files, file)
            if not config or not self._tokens:
                continue
            nested = config.get("text_config")
            places = [config, *([nested] if isinstance(nested, dict) else [])]
            own = self._own(file)
            for key, (number, _) in self._tokens.items():
                having = [place for place in places if key in place]
                always = file == GENERATION or key == "eos_token_id"
                for place in having or (places[:1] if always else ()):
                    value = place.get(key)
                    wanted = _wanted(value, own.get(key), number, several=file == GENERATION)
                    if wanted != value:
                        place[key] = wanted
                        changed.setdefault(key, []).append(file)
            if any(file in where for where in changed.values()):
                files[file] = as_json(config)
        return [
            f"{key} of {' and '.join(dict.fromkeys(where))} is that of the tokenizer:"
            f" {self._tokens[key][0]}, {self._tokens[key][1]!r}"
            for key, where in changed.items()
        ]

    def _own(self, file: str) -> Mapping[str, Any]:
        """What the tokenizer's own model has in that file."""
        path = self._folder / file
        try:
            found = read_json(path) if exists(path) else {}
        except CheckpointError:
            return {}
        nested = found.get("text_config")
        return {**nested, **found} if isinstance(nested, Mapping) else found


def _id_of(token: str, tokens: Tokens, changes: TokenizerChanges | None) -> int | None:
    added = {each.content: i for each, i in changes.added} if changes is not None else {}
    dropped = changes is not None and token in changes.dropped
    return added.get(token, None if dropped else tokens.ids.get(token))


def _wanted(value: Any, its: Any, number: int, *, several: bool) -> Any:
    """The new value of an entry. its: the value of the tokenizer's own model, used where it agrees
    with the tokenizer, since several tokens may end a text. several: whether the entry may be a
    list.
    """
    if _names(its, number):
        return its
    if _names(value, number):
        return value
    if several and isinstance(value, list):
        return [number, *value]
    return number


def _names(value: Any, number: int) -> bool:
    return value == number if type(value) is int else isinstance(value, list) and number in value


def _json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        return parse_object(files[name], Path(name)) if name in files else {}
    except CheckpointError:  # as damaged as the original
        return {}
