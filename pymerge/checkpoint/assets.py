"""Everything in a model folder beside the weights: configs, tokenizer, model card."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pymerge.checkpoint.files import read_json
from pymerge.checkpoint.folder import OutputFolder
from pymerge.checkpoint.links import own_files
from pymerge.checkpoint.reader import OpenModel
from pymerge.checkpoint.writer import translated
from pymerge.errors import CheckpointError
from pymerge.plan import MergeRecipe
from pymerge.planner import Plan, Vocabulary

_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "bpe.codes",
    "tekken.json",
    "*.tiktoken",
    "*.model",
    "*.spm",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
_CONFIGS = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "*.py",  # code that a config's auto_map names; loading it still takes trust_remote_code
)
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def write_assets(
    folder: OutputFolder, recipe: MergeRecipe, plan: Plan, models: Sequence[OpenModel]
) -> list[str]:
    """Write all of it into the partial folder. What the source folder lacks is left out. Returns notes."""
    main = models[recipe.base or 0]
    moved = plan.vocabulary.new_ids if plan.vocabulary is not None else {}
    speaker = models[recipe.tokenizer] if recipe.tokenizer is not None else main
    configs = ("config.json", *_CONFIGS)
    wanted = [(main, configs), (speaker, _TOKENIZER)]
    if speaker is main:
        wanted = [(main, (*configs, *_TOKENIZER))]
    notes: list[str] = []
    for model, patterns in wanted:
        if model.folder is None:
            continue
        paths, left_out = own_files(model.folder, _matching(model.folder, patterns))
        notes += left_out
        for path in paths:
            if path.name != "config.json":
                _copy(path, folder.partial / path.relative_to(model.folder))
                continue
            config = fixed_config(dict(main.header.config), recipe, plan)
            text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
            folder.write_text("config.json", text)
    if moved:
        _move_ids(folder, "generation_config.json", moved)
    if recipe.chat_template is not None:
        folder.write_text("chat_template.jinja", recipe.chat_template)
    folder.write_text("README.md", model_card(recipe, folder.out.name))
    return notes


def _matching(folder: Path, patterns: Sequence[str]) -> list[Path]:
    found = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
    return [path for path in found if not path.is_dir()]


def _copy(source: Path, target: Path) -> None:
    with translated(target):
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, target)


def fixed_config(config: dict[str, Any], recipe: MergeRecipe, plan: Plan) -> dict[str, Any]:
    """config.json with the dtype of the result, its vocabulary and, where layers were taken apart, their number and kinds."""
    if plan.dtype:
        _set_dtype(config, plan.dtype)
        if "dtype" not in config and "torch_dtype" not in config:
            config["torch_dtype"] = plan.dtype
    if plan.vocabulary is not None:
        _set_vocabulary(config, plan.vocabulary)
    if recipe.sliced and recipe.num_layers is not None:
        _set_layers(config, recipe.num_layers, _layer_origins(plan))
        nested = config.get("text_config")
        if isinstance(nested, dict):
            config["text_config"] = dict(nested)
            _set_layers(config["text_config"], recipe.num_layers, _layer_origins(plan))
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


def _move_ids(folder: OutputFolder, name: str, new_ids: Mapping[int, int | None]) -> None:
    try:
        content = read_json(folder.partial / name)
    except CheckpointError:  # not there, or as damaged as the original
        return
    changed = _with_new_ids(content, new_ids)
    if changed:
        folder.write_text(name, json.dumps(content | changed, indent=2, ensure_ascii=False) + "\n")


def _set_layers(config: dict[str, Any], count: int, origins: dict[int, int]) -> None:
    had = None
    for key in _LAYER_COUNTS:
        if isinstance(config.get(key), int):
            had = config[key]
            config[key] = count
    for key, value in config.items():  # layer_types and the like: one entry a layer
        if isinstance(value, list) and had and len(value) == had and key.startswith("layer"):
            config[key] = [value[origins.get(layer, layer) % had] for layer in range(count)]


def _layer_origins(plan: Plan) -> dict[int, int]:
    """Output layer -> the layer it was in its first source, from the first number that the names hold."""
    origins: dict[int, int] = {}
    for tensor in plan.tensors:
        new, old = (
            re.search(r"\.(\d+)\.", name) for name in (tensor.name, tensor.sources[0].tensor)
        )
        if new and old:
            origins.setdefault(int(new.group(1)), int(old.group(1)))
    return origins


def model_card(recipe: MergeRecipe, name: str) -> str:
    """README.md: front matter that the hub reads, and the recipe."""
    bases = [
        m for m in recipe.models if _HUB_ID.fullmatch(m.partition("@")[0]) and not Path(m).exists()
    ]
    lines = ["---"]
    if bases:
        lines += ["base_model:", *(f"- {json.dumps(model.partition('@')[0])}" for model in bases)]
    lines += ["library_name: transformers", "tags:", "- merge", "- mergekit", "- pymerge", "---"]
    listed = "\n".join(f"- {Path(m).name if Path(m).exists() else m}" for m in recipe.models)
    base = (
        "" if recipe.base is None else f" with {Path(recipe.models[recipe.base]).name} as the base"
    )
    text = f"""
# {name}

A merge of fine-tuned models, made with pymerge by the method `{recipe.method}`{base}.

Models:

{listed}

The recipe, in mergekit's format:

```yaml
{recipe.text.rstrip()}
```
"""
    return "\n".join(lines) + "\n" + text
