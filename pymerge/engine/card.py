"""What a merged model says of where it comes from: its model card, and models by names that hold no
local paths.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pymerge.recipe.model import MergeRecipe

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LOCAL = re.compile(r"(?:~[^/\s]*)?/.*", re.DOTALL)


def short_name(reference: str) -> str:
    """A model without the folders that it lies in; a hub id as it is."""
    if not _exists(reference) and not _LOCAL.fullmatch(reference):
        return reference
    return Path(reference).name or Path(reference).resolve().name or reference


def short_recipe(text: str) -> str:
    """A recipe in YAML with absolute paths cut to their last component."""
    import yaml

    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError:
        return re.sub(r"(?<![\w.~])(?:~|/)[^\s'\",\[\]{}]*/", "", text)
    short = _shortened(data)
    if short == data:
        return text
    written: str = yaml.safe_dump(short, sort_keys=False, allow_unicode=True)
    return written


def _shortened(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: each if key == "chat_template" else _shortened(each) for key, each in value.items()
        }
    if isinstance(value, list):
        return [_shortened(each) for each in value]
    if isinstance(value, str) and _LOCAL.fullmatch(value):
        return short_name(value)
    return value


def _exists(reference: str) -> bool:
    try:
        return Path(reference).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


def model_card(recipe: MergeRecipe, name: str, *, full_paths: bool = False) -> str:
    """README.md: front matter that the hub reads, and the recipe. full_paths: local paths as the
    recipe has them.
    """
    bases = [m for m in recipe.models if _HUB_ID.fullmatch(m.partition("@")[0]) and not _exists(m)]
    lines = ["---"]
    if bases:
        lines += ["base_model:", *(f"- {json.dumps(model.partition('@')[0])}" for model in bases)]
    lines += ["library_name: transformers", "tags:", "- merge", "- mergekit", "- pymerge", "---"]
    models = recipe.models if full_paths else [short_name(model) for model in recipe.models]
    listed = "\n".join(f"- {model}" for model in models)
    base = "" if recipe.base is None else f" with {models[recipe.base]} as the base"
    written = recipe.text if full_paths else short_recipe(recipe.text)
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
