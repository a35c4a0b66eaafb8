"""The adapter that a merge of adapters writes: its plan, and the files beside its weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from pymerge.checkpoint.adapter import AdaptedModel
from pymerge.checkpoint.adapter_config import CONFIG
from pymerge.checkpoint.files import as_json
from pymerge.checkpoint.reader import OpenModel
from pymerge.checkpoint.stored import StoredTensor
from pymerge.engine.assets import Assets
from pymerge.engine.card import ShortNames
from pymerge.messages.arguments import argument
from pymerge.messages.words import shown, type_of
from pymerge.planning.adapter_plan import (
    EXACT,
    Rank,
    adapter_plan,
    ranks,
    saved_modules,
    summary_note,
)
from pymerge.planning.plan import Plan
from pymerge.recipe.model import MergeRecipe

_PIECE = 8 << 20
_MOST = 1 << 16


def check_rank(rank: object, name: str = "rank") -> None:
    """Raise TypeError or ValueError for what is no rank. name: the argument; "" where the message
    follows the option's name.
    """
    said = argument(name, rank) if name else shown(rank)
    if isinstance(rank, bool) or not isinstance(rank, (int, str)):
        raise TypeError(f"{said} is {type_of(rank)}; pass {EXACT!r}, or a whole number")
    if rank != EXACT and not (isinstance(rank, int) and 1 <= rank <= _MOST):
        raise ValueError(f"{said} is neither {EXACT!r} nor a whole number from 1 to {_MOST}")


def plan_adapter(
    recipe: MergeRecipe,
    plan: Plan,
    models: Sequence[OpenModel],
    rank: Rank,
    *,
    full_paths: bool = False,
) -> tuple[Plan, Assets]:
    """The plan of the adapter instead of that of the model, and its config."""
    made = adapter_plan(plan, recipe, models, rank, same_tensors)
    files, notes = {}, made.notes
    if not made.problems:
        files[CONFIG] = as_json(config_of(made, models, full_paths=full_paths))
        notes = (*notes, summary_note(made))
    return replace(made, notes=notes), Assets(files, (), (), (), made=True)


def same_tensors(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two stored tensors hold the same bytes."""
    if (one.info.dtype, one.info.shape) != (other.info.dtype, other.info.shape):
        return False
    held = bytearray(min(_PIECE, one.nbytes)), bytearray(min(_PIECE, one.nbytes))
    for begin in range(0, one.nbytes, _PIECE):
        size = min(_PIECE, one.nbytes - begin)
        pieces = [memoryview(each)[:size] for each in held]
        for stored, piece in zip((one, other), pieces, strict=True):
            stored.read_into(begin, piece)
        if pieces[0] != pieces[1]:
            return False
    return True


def config_of(plan: Plan, models: Sequence[OpenModel], *, full_paths: bool) -> dict[str, Any]:
    """adapter_config.json of the result: alpha is the rank in every module, so that the scale is
    1.
    """
    found = ranks(plan)
    usual = max(found.values(), key=[*found.values()].count, default=1)
    others = {_pattern(module, found): r for module, r in found.items() if r != usual}
    adapted = [model for model in models if isinstance(model, AdaptedModel)]
    configs = [each.adapter.config for each in adapted if each.adapter.config is not None]
    tasks = {config.task for config in configs}
    bases = {config.base for config in configs}
    base = next(iter(bases)) if len(bases) == 1 else None
    if base is None:
        reference = adapted[0].base.reference
        base = reference if full_paths else ShortNames((reference,)).of(reference)
    factors = [t.factor for t in plan.tensors if t.factor is not None]
    return {
        "peft_type": "LORA",
        "task_type": next(iter(tasks)) if len(tasks) == 1 else None,
        "base_model_name_or_path": base,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(found),
        "modules_to_save": saved_modules(plan) or None,
        "fan_in_fan_out": any(
            f.transposed and not _embeds(plan, f.module) for f in factors if f.which == "A"
        ),
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _pattern(module: str, modules: Iterable[str]) -> str:
    """For peft, which takes it for the end of names: only the whole name, where another ends so."""
    alike = any(other.endswith(f".{module}") for other in modules)
    return f"^{re.escape(module)}" if alike else module


def _embeds(plan: Plan, module: str) -> bool:
    name = f"{module}.lora_embedding_A"
    return any(tensor.name.endswith(name) for tensor in plan.tensors)
