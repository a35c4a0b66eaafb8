"""adapter_config.json: what says how large an adapter's updates are, and what cannot be merged."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymerge.checkpoint.files import exists, read_json
from pymerge.checkpoint.patterns import ByPattern, by_pattern
from pymerge.errors import CheckpointError

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
VECTORS = "IA3"  # peft's name for (IA)^3
_MOST_NAME = 1024  # characters of the base's
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
    ranks: ByPattern
    alphas: ByPattern
    rslora: bool
    transposed: bool
    dora: bool
    base: str | None
    task: str | None
    copied: tuple[str, ...] = ()

    def rank_of(self, module: str) -> int:
        """r of a module. ValueError for a name that is too long for the patterns, as
        `scale_of`.
        """
        return int(self.ranks.of(module, self.rank))

    def scale_of(self, module: str) -> float:
        """s in s B A: alpha / r, or with rslora alpha / sqrt(r)."""
        rank = self.rank_of(module)
        alpha = self.alphas.of(module, self.alpha)
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
    base = _base(folder / CONFIG, raw.get("base_model_name_or_path"), raw.get("revision"))
    return VectorConfig(base, _text(raw.get("task_type")))


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
        ranks=_patterns(path, raw, "rank_pattern", _rank),
        alphas=_patterns(path, raw, "alpha_pattern", _number),
        rslora=bool(raw.get("use_rslora")),
        transposed=bool(raw.get("fan_in_fan_out")),
        dora=bool(raw.get("use_dora")),
        base=_base(path, raw.get("base_model_name_or_path"), raw.get("revision")),
        task=_text(raw.get("task_type")),
        copied=_copied(raw),
    )


def _copied(raw: Mapping[str, Any]) -> tuple[str, ...]:
    found = raw.get("modules_to_save")
    if raw.get("ensure_weight_tying") or not isinstance(found, list):
        return ()
    return tuple(name for name in found if isinstance(name, str))


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _base(path: Path, name: Any, revision: Any) -> str | None:
    base = _text(name)
    if base is not None and _text(revision) is not None:
        base = f"{base}@{revision}"
    if base is not None and len(base) > _MOST_NAME:
        raise _damaged(path, f"base_model_name_or_path has {len(base)} characters and names none")
    return base


def _patterns(
    path: Path, raw: Mapping[str, Any], what: str, read: Callable[[Path, str, Any], float]
) -> ByPattern:
    found = raw.get(what) or {}
    if not isinstance(found, dict):
        raise _damaged(path, f"{what} is not a mapping of module names")
    try:
        return by_pattern({k: read(path, f"{what} {k[:40]!r}", v) for k, v in found.items()})
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: {what} {error}") from None


def _rank(path: Path, what: str, value: Any) -> int:
    if type(value) is not int or not 0 < value < 1 << 31:
        raise _damaged(path, f"{what} is {str(value)[:40]!r}, not a number of factors")
    return value


def _number(path: Path, what: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, (bool, str)) else float(value)
    except (TypeError, OverflowError):  # an integer may be beyond all floats
        number = math.nan
    if not math.isfinite(number):
        raise _damaged(path, f"{what} is {str(value)[:40]!r}, not a finite number")
    return number


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: {what}; download it again")


def _refused(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path.parent}: holds an adapter that cannot be merged here: {why}")
