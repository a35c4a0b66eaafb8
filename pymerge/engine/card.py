"""The model card of a merged model, and names for models that reveal no local paths."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pymerge.checkpoint.hub import local_path, split_adapter
from pymerge.recipe.model import MergeRecipe

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LOCAL = re.compile(r"(?:~[^/\s]*)?/.*|\.(?:.*/.*|\.?)", re.DOTALL)
_PATH_KEYS = ("model", "base_model", "path", "statistics")


class ShortNames:
    """Names local paths by their last component, or by as many as tell those of one recipe apart;
    hub ids are unchanged.

    paths: of the recipe's models and statistics, as they are opened.
    """

    def __init__(self, paths: Iterable[str | None] = ()) -> None:
        given = [part for path in paths if path is not None for part in _parts(path)]
        self._hub = {path.partition("@")[0] for path in given if not _is_local(path)}
        places = {_place(path) for path in given if _is_local(path)}
        self._short = {place: _distinct(place, places) for place in places}

    def of(self, reference: str, *, path: bool = False) -> str:
        """The short name. path: the reference is a path and cannot be a hub id."""
        parts = _parts(reference)
        if len(parts) > 1:
            return "+".join(map(self.of, parts))
        place = self._place_of(reference, path)
        if place is None:
            return reference
        return self._short.get(place) or place.rpartition("/")[2] or reference

    def recipe(self, text: str) -> str:
        """A recipe in YAML with its paths shortened."""
        import yaml

        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError:
            return re.sub(r"(?<![\w.~])(?:~|/)[^\s'\",\[\]{}]*/", "", text)
        short = self._shortened(data)
        if short == data:
            return text
        written: str = yaml.safe_dump(short, sort_keys=False, allow_unicode=True)
        return written

    def _shortened(self, value: Any, key: object = None) -> Any:
        if isinstance(value, dict):
            return {
                name: each if _is_text(name, each) else self._shortened(each, name)
                for name, each in value.items()
            }
        if isinstance(value, list):
            return [self._shortened(each, key) for each in value]
        # Without a slash it may be a keyword, as `base` for tokenizer_source.
        if isinstance(value, str) and ("/" in value or key in _PATH_KEYS or value in (".", "..")):
            return self.of(value, path=key == "statistics")
        return value

    def _place_of(self, reference: str, path: bool) -> str | None:
        """The absolute path of a reference; None for a hub id."""
        if local_path(reference) is not None:
            return _place(reference)
        if not path and reference.partition("@")[0] in self._hub:
            return None
        # It may be relative to the recipe's folder.
        tail = [part for part in os.path.normpath(reference).split("/") if part not in ("..", ".")]
        if tail and not reference.startswith(("/", "~")):
            for place in self._short:
                if place.split("/")[-len(tail) :] == tail:
                    return place
        return _place(reference) if path or _LOCAL.fullmatch(reference) else None


def _is_text(key: object, value: Any) -> bool:
    """Whether it is a Jinja text or a token, and no path, whatever it looks like."""
    if not isinstance(value, str):
        return False
    return key == "token" or (key == "chat_template" and "{" in value)


def _parts(reference: str) -> tuple[str, ...]:
    """A reference, or those of a model and of the adapter on it."""
    return split_adapter(reference) or (reference,)


def _is_local(reference: str) -> bool:
    return local_path(reference) is not None or _LOCAL.fullmatch(reference) is not None


def _place(reference: str) -> str:
    """An absolute path without resolving links, whose names are those that people know."""
    try:
        path = Path(reference).expanduser()
    except RuntimeError:  # no such user's home
        path = Path(reference)
    return "/" + os.path.normpath(path.absolute()).lstrip("/")


def _distinct(place: str, places: Iterable[str]) -> str:
    """The fewest last components that no other place ends with."""
    parts = place.split("/")[1:]
    others = [other.split("/")[1:] for other in places if other != place]
    for count in range(1, len(parts)):
        if all(other[-count:] != parts[-count:] for other in others):
            return "/".join(parts[-count:])
    return "/".join(parts)


def model_card(
    recipe: MergeRecipe, name: str, *, full_paths: bool = False, library: str = "transformers"
) -> str:
    """README.md: front matter for the hub, and the recipe. full_paths: keep local paths as in the
    recipe. library: what loads the result.
    """
    given = dict.fromkeys(part for model in recipe.models for part in _parts(model))
    bases = [m for m in given if _HUB_ID.fullmatch(m.partition("@")[0]) and local_path(m) is None]
    lines = ["---"]
    if bases:
        lines += ["base_model:", *(f"- {json.dumps(model.partition('@')[0])}" for model in bases)]
        lines += ["base_model_relation: merge"]  # one of them alone would count as a fine-tune's
    lines += [f"library_name: {library}", "tags:", "- merge", "- mergekit", "- pymerge", "---"]
    names = ShortNames((*recipe.models, *recipe.statistics))
    models = recipe.models if full_paths else [names.of(model) for model in recipe.models]
    listed = "\n".join(f"- {model}" for model in models)
    base = "" if recipe.base is None else f" with {models[recipe.base]} as the base"
    written = recipe.text if full_paths else names.recipe(recipe.text)
    text = f"""
# {name}

A merge of fine-tuned models, made with pymerge by the method `{recipe.method}`{base}.

Models:

{listed}

The recipe, in mergekit's format:

```yaml
{written.rstrip()}
```
"""
    return "\n".join(lines) + "\n" + text
