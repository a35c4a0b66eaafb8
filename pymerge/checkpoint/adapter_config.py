"""adapter_config.json: what says how large an adapter's updates are, and what cannot be merged."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymerge.checkpoint.files import exists, read_json
from pymerge.errors import CheckpointError

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
VECTORS = "IA3"  # peft's name for (IA)^3
_MOST_PATTERN = 1000  # characters
# Settings of peft under which the update is not s B A, and why.
_OTHERS = {
    "alora_invocation_tokens": "its update counts only after certain tokens, and weights know none",
    "arrow_config": "it chooses among adapters for every token, and weights cannot",
    "kasa_config": "its update is not the product of its factors",
    "layer_replication": "it repeats layers of its base; merge it with peft (merge_and_unload)",
    "megatron_config": "its base is split over several devices",
    "monteclora_config": "its update is drawn at random",
    "target_parameters": (
        "it updates parameters that are no module's weight, as fused experts; merge it with peft"
        " (merge_and_unload)"
    ),
    "trainable_token_indices": (
        "it replaces rows of single tokens; merge it with peft (merge_and_unload)"
    ),
    "use_bdlora": "its factors are blocks of matrices; merge it with peft (merge_and_unload)",
    "use_qalora": "its update is pooled for a quantized base; merge it with peft",
}
# Initialisations that subtract the adapter's first update from the base.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class AdapterConfig:
    """What of an adapter_config.json a merge needs.

    base: the base's reference, as it was given when the adapter was trained. task: peft's name for
    the kind of model. transposed: whether weights are stored (d_in, d_out), as in GPT-2
    (fan_in_fan_out). copied: modules that were copied to be trained (modules_to_save), unless the
    copies of an embedding and an output layer were tied.
    """

    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rslora: bool
    transposed: bool
    dora: bool
    base: str | None
    task: str | None
    copied: tuple[str, ...] = ()

    def rank_of(self, module: str) -> int:
        return int(_by_pattern(self.ranks, module, self.rank))

    def scale_of(self, module: str) -> float:
        """s in s B A: alpha / r, or with rslora alpha / sqrt(r)."""
        rank = self.rank_of(module)
        alpha = _by_pattern(self.alphas, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


@dataclass(frozen=True)
class VectorConfig:
    """What of the config of an (IA)^3 adapter matters here: the base's reference, and peft's name
    for the kind of model.
    """

    base: str | None
    task: str | None


def read_vector_config(folder: Path) -> VectorConfig | None:
    """None where the folder holds no (IA)^3 adapter. CheckpointError for a damaged config."""
    if not exists(folder / CONFIG):
        return None
    raw = read_json(folder / CONFIG)
    if raw.get("peft_type") != VECTORS:
        return None
    base = _text(raw.get("base_model_name_or_path"), raw.get("revision"))
    return VectorConfig(base, _text(raw.get("task_type"), None))


def read_config(path: Path) -> AdapterConfig:
    """Raises CheckpointError for a config that is damaged, or of an adapter whose update is not
    s B A.
    """
    raw = read_json(path)
    kind = raw.get("peft_type", "LORA")
    if kind == VECTORS:
        raise _refused(
            path,
            "peft_type is 'IA3', whose vectors are merged with those of other such adapters, into"
            " an adapter; name these folders by themselves, without a base",
        )
    if kind != "LORA":
        raise _refused(path, f"peft_type is {str(kind)[:40]!r}, and only 'LORA' can be merged here")
    problems = [f"it sets {key}: {why}" for key, why in _OTHERS.items() if raw.get(key)]
    start = raw.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGE_THE_BASE):
        problems.append(
            f"init_lora_weights is {start[:40]!r}, which changed the base before the training, so"
            " that the update is not for the base as it is published; save it converted (peft:"
            " path_initial_model_for_weight_conversion)"
        )
    if problems:
        raise _refused(path, "; ".join(problems))
    return AdapterConfig(
        rank=_rank(path, "r", raw.get("r", 8)),
        alpha=_number(path, "lora_alpha", raw.get("lora_alpha", 8)),
        ranks={k: _rank(path, f"rank_pattern {k!r}", v) for k, v in _patterns(path, raw, "rank")},
        alphas={
            k: _number(path, f"alpha_pattern {k!r}", v) for k, v in _patterns(path, raw, "alpha")
        },
        rslora=bool(raw.get("use_rslora")),
        transposed=bool(raw.get("fan_in_fan_out")),
        dora=bool(raw.get("use_dora")),
        base=_text(raw.get("base_model_name_or_path"), raw.get("revision")),
        task=_text(raw.get("task_type"), None),
        copied=_copied(raw),
    )


def _copied(raw: Mapping[str, Any]) -> tuple[str, ...]:
    found = raw.get("modules_to_save")
    if raw.get("ensure_weight_tying") or not isinstance(found, list):
        return ()
    return tuple(name for name in found if isinstance(name, str))


def _text(base: Any, revision: Any) -> str | None:
    if not isinstance(base, str) or not base:
        return None
    return f"{base}@{revision}" if isinstance(revision, str) and revision else base


def _patterns(path: Path, raw: Mapping[str, Any], what: str) -> list[tuple[str, Any]]:
    found = raw.get(f"{what}_pattern") or {}
    if not isinstance(found, dict):
        raise _damaged(path, f"{what}_pattern is not a mapping of module names")
    for pattern in found:
        try:
            if len(pattern) > _MOST_PATTERN:
                raise re.error("too long")
            re.compile(pattern)
        except re.error as error:
            raise _damaged(
                path, f"{what}_pattern {pattern[:40]!r} is no pattern ({error})"
            ) from None
    return list(found.items())


def _rank(path: Path, what: str, value: Any) -> int:
    if type(value) is not int or not 0 < value < 1 << 31:
        raise _damaged(path, f"{what} is {str(value)[:40]!r}, not a number of factors")
    return value


def _number(path: Path, what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise _damaged(path, f"{what} is {str(value)[:40]!r}, not a finite number")
    return float(value)


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: {what}; download it again")


def _refused(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path.parent}: holds an adapter that cannot be merged here: {why}")


def _by_pattern(patterns: Mapping[str, float], module: str, usual: float) -> float:
    """The value of the first pattern that the end of a module's name matches, as peft reads them:
    regular expressions of whole components.
    """
    for pattern, value in patterns.items():
        if _compiled(pattern).match(module):
            return value
    return usual


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")
