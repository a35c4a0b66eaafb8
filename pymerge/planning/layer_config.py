"""Config entries that describe each layer, for slices, which renumber the layers
(docs/configuration.md, "Slices").

Configs give the kind of a layer in four ways: a list with one entry per layer, a list of layer
numbers, a repeating pattern, and a number from which a rule derives the kind (every sixth, the
first three). The first three are carried over. The fourth is kept where the rule gives every layer
its old kind, and replaced where the config has another way to say it. Any other entry about layers
is an error, since transformers would otherwise fill missing weights at random.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from pymerge.recipe.layers import LAYER_COUNTS, Origin

Config = Mapping[str, Any]
Kind = Callable[[Config, int], Any]  # kind of layer i by a rule; None where the rule does not apply

# From this number of layers on, a list of that length has one entry per layer, whatever its name.
_MANY = 6
_OF_LAYERS = re.compile(r"layer|block|pattern|types|heads|sparsity|window|intermediate_size|freq")
_NUMBERS = re.compile(r"layer|block|attn|idx|index|indices")
_NEVER = re.compile(r"_token_ids?$|_tokens$|architectures|label|_modules|_section|image_|patch_")
# Numbers with layers in their names that do not concern single layers of this list.
_HARMLESS = re.compile(
    r"per_layer|norm|drop|scale|nextn|mtp|encoder|decoder|adapter|vision|audio|projector|classif"
)
_INDICES = (  # lists of layer numbers, even if they are as long as the model
    "mlp_only_layers",
    "moe_layers",
    "full_attn_idxs",
    "attn_layer_idx",
    "attn_layer_indices",
    "hybrid_layer_ids",
    "local_layer_ids",
    "cross_attention_layers",
)
_REPEATED = ("block_types", "sliding_window_pattern", "_sliding_window_pattern")
# Defaults of the numbers below, by the config's model type.
_DEFAULTS: dict[str, dict[str, int]] = {
    "sliding_window_pattern": {"gemma2": 2, "gemma3_text": 6, "cohere2": 4, "gpt_oss": 2},
    "no_rope_layer_interval": {"smollm3": 4, "llama4_text": 4},
    "full_attention_interval": {"qwen3_next": 4, "qwen3_5_text": 4, "qwen3_5_moe_text": 4},
    "global_attn_every_n_layers": {"modernbert": 3},
}
_PARTS = (  # entries that only rules look at
    "attn_layer_offset",
    "expert_layer_offset",
    "moe_layer_end_index",
    "moe_layer_interval",
)
# What says that weights of several layers are one tensor, so that no layer is had alone.
_SHARED = {
    "hidden_size_per_layer_input": "has one tensor hold a part of every layer (`per_layer`)",
    "num_mem_blocks": "has layers share the weights of a few blocks",
}


class _CannotCarry(Exception):
    """An entry that cannot be carried over, and why."""


def carry_layers(
    configs: Sequence[Config], main: int, origins: Sequence[Origin]
) -> tuple[dict[str, Any], list[str]]:
    """(entries to change in the config of model `main`, problems).

    configs: of all models. origins: of every layer of the result.
    """
    config = configs[main]
    if not config:
        return {}, []
    changed: dict[str, Any] = {}
    problems: list[str] = []
    nested = config.get("text_config")
    levels = [(config, list(configs))] if _count(config) is not None else []
    if isinstance(nested, dict) and _count(nested) is not None:
        inner = [each.get("text_config") for each in configs]
        levels.append((nested, [each if isinstance(each, dict) else {} for each in inner]))
    if not levels and "model_type" not in config:  # no library's config
        return {}, []
    if not levels:
        return {}, [
            f"its config gives no number of layers under a name that is known"
            f" ({', '.join(LAYER_COUNTS)}), and slices change it"
        ]
    counts = [_count(level) for level, _ in levels]
    if len(set(counts)) > 1:  # two stacks, as in CLAP and BridgeTower
        return {}, [
            f"its config counts {counts[0]} layers, its text_config {counts[1]}; which of them the"
            " slices mean cannot be told, so such models are not sliced"
        ]
    for level, all_configs in levels:
        found = _Level(level, all_configs, main, origins)
        problems += found.problems
        if level is nested:
            changed["text_config"] = {**nested, **found.changed}
        else:
            changed |= found.changed
    return changed, problems


def _count(config: Config) -> int | None:
    found = (_number(config, key) for key in LAYER_COUNTS)
    return next((number for number in found if number is not None), None)


def _number(config: Config, key: str) -> int | None:
    value = config.get(key)
    if value is None:
        value = _DEFAULTS.get(key, {}).get(str(config.get("model_type")))
    return value if _is_int(value) else None


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class _Level:
    """A config, or its text_config. changed, problems: the outcome."""

    def __init__(
        self, config: Config, configs: Sequence[Config], main: int, origins: Sequence[Origin]
    ) -> None:
        self.changed: dict[str, Any] = {}
        self.problems: list[str] = []
        self._config = config
        # A model without a config is assumed to have the main one.
        self._configs = [each if _count(each) is not None else config for each in configs]
        self._origins = origins
        for key in LAYER_COUNTS:
            if _is_int(config.get(key)):
                self.changed[key] = len(origins)
        for key, value in config.items():
            self._try(key, partial(self._entry, key, value))
        for key in dict.fromkeys(key for each in self._configs for key in each):
            if key not in config:
                self._try(key, partial(self._elsewhere, key))
        for name, kind in _RULES.items():
            self._try(name, partial(self._rule, name, kind))

    def _try(self, key: str, carry: Callable[[], None]) -> None:
        try:
            carry()
        except _CannotCarry as error:
            self.problems.append(f"{key} of its config {error}")
        except (ArithmeticError, LookupError, TypeError, ValueError):  # anybody may have written it
            self.problems.append(
                f"{key} of its config, or of another model's, is nothing that says of every layer"
                " what it is; mend it, or remove it"
            )

    def _entry(self, key: str, value: Any) -> None:
        count = _count(self._config) or 0
        if (
            key in _SHARED
            and value
            and (count != len(self._origins) or not self._stays(key, value))
        ):
            raise _CannotCarry(
                f"{_SHARED[key]}; slices of it are not there: merge all of its layers"
            )
        rule = key in _PARTS or (key in _RULES and _is_int(value))
        if key in LAYER_COUNTS or rule or _NEVER.search(key):
            return
        if key == "attention_types" and isinstance(value, list):
            self.changed[key] = [[self._carried(key, _expanded), 1]]
        elif _is_repeated(key, value, count):
            self._repeated(key, value)
        elif isinstance(value, (list, str)) and _is_numbers(key, value, count):
            numbers = [i for i, origin in enumerate(self._origins) if self._is_in(key, origin)]
            text = ",".join(map(str, numbers))
            self.changed[key] = text if isinstance(value, str) else numbers
        elif isinstance(value, (list, str)) and _is_entries(key, value, count):
            carried = self._carried(key, _entries)
            self.changed[key] = "".join(carried) if isinstance(value, str) else carried
        elif isinstance(value, dict) and _is_by_number(key, value):
            self.changed[key] = self._by_number(key)
        elif "layer" in key and _may_speak(key, value) and not self._stays(key, value):
            raise _CannotCarry(
                f"({str(value)[:60]}) speaks of layers in a way that is not known, and slices give"
                " them other numbers"
            )

    def _stays(self, key: str, value: Any) -> bool:
        """Whether all layers keep their numbers and the models agree on an entry."""
        return all(
            origin.layer == i and self._configs[origin.model].get(key) == value
            for i, origin in enumerate(self._origins)
        )

    def _elsewhere(self, key: str) -> None:
        """Problems for entries that only another model's config has."""
        values = []
        for origin in self._origins:
            config = self._configs[origin.model]
            value = config.get(key)
            count = _count(config) or 0
            if key not in _RULES and isinstance(value, list) and _is_entries(key, value, count):
                values.append(value[origin.layer] if origin.layer < count else None)
        if any(value != values[0] for value in values):
            raise _CannotCarry("is not there, and other models' layers have different kinds by it")

    def _carried(self, key: str, entries: Callable[[Any, int], Any]) -> list[Any]:
        found = []
        for origin in self._origins:
            config = self._configs[origin.model]
            count = _count(config) or 0
            value = entries(config.get(key), count)
            if value is None or origin.layer >= len(value):
                raise _CannotCarry(
                    f"has an entry a layer, and none for layer {origin.layer} of a model that gives"
                    " it"
                )
            found.append(value[origin.layer])
        return found

    def _is_in(self, key: str, origin: Origin) -> bool:
        value = self._configs[origin.model].get(key)
        if isinstance(value, str):
            return origin.layer in map(int, value.split(","))
        return isinstance(value, list) and origin.layer in value

    def _by_number(self, key: str) -> dict[str, Any]:
        """Numbers may be written with zeros before them, "05"."""
        found = {}
        width = min(map(len, self._config[key]))
        for i, origin in enumerate(self._origins):
            value = self._configs[origin.model].get(key)
            for number, entry in value.items() if isinstance(value, dict) else ():
                if int(number) == origin.layer:
                    found[f"{i:0{width}}"] = entry
        return found

    def _repeated(self, key: str, value: Sequence[Any]) -> None:
        wanted = []
        for origin in self._origins:
            other = self._configs[origin.model].get(key)
            if not isinstance(other, (list, str)) or not other:
                raise _CannotCarry("repeats a pattern, which another model's does not")
            wanted.append(other[origin.layer % len(other)])
        if wanted != [value[i % len(value)] for i in range(len(wanted))]:
            self.changed[key] = "".join(wanted) if isinstance(value, str) else wanted

    def _rule(self, name: str, kind: Kind) -> None:
        wanted = [kind(self._configs[o.model], o.layer) for o in self._origins]
        after = {**self._config, **self.changed}
        now = [kind(after, i) for i in range(len(wanted))]
        if wanted == now or all(each is None for each in wanted):
            return
        other_way = _OTHER_WAYS.get(name)
        changed = None
        if other_way is not None and None not in wanted:
            changed = other_way(after, wanted)
        if changed is None:
            i = next(i for i, (w, n) in enumerate(zip(wanted, now, strict=True)) if w != n)
            raise _CannotCarry(
                f"gives layers their kind by their number, and would give layer {i} of the result,"
                f" which was layer {self._origins[i].layer}, another; choose layer_range so that"
                " layers keep their place in the pattern"
            )
        self.changed |= changed


def _entries(value: Any, count: int) -> Any:
    return value if isinstance(value, (list, str)) and len(value) == count else None


def _expanded(value: Any, count: int) -> Any:
    """GPT-Neo's [[["global", "local"], 12]]: a pattern and its number of repetitions, written
    out.
    """
    try:
        if sum(len(kinds) * max(0, times) for kinds, times in value) != count:
            return None  # before it is written out, which could take all memory
        return [kind for kinds, times in value for kind in list(kinds) * times]
    except (TypeError, ValueError):
        return None


def _is_repeated(key: str, value: Any, count: int) -> bool:
    return key in _REPEATED and isinstance(value, (list, str)) and bool(value)


def _is_numbers(key: str, value: Any, count: int) -> bool:
    """Whether this is a list of layer numbers, possibly as text, `3,4,5`."""
    if isinstance(value, str):
        if "layer" not in key or not re.fullmatch(r"\d+(,\d+)+", value):
            return False
        value = [int(each) for each in value.split(",")]
    numbers = all(_is_int(each) and 0 <= each < count for each in value)
    if not numbers or len(set(value)) != len(value):
        return False
    if key in _INDICES:
        return True
    if len(value) == count and not (count > 2 and value == sorted(value)):
        return False
    return bool(value) and bool(_NUMBERS.search(key))


def _is_entries(key: str, value: Any, count: int) -> bool:
    """Whether this is a list, or text, with one entry per layer."""
    if len(value) != count or not count or _NEVER.search(key):
        return False
    if isinstance(value, str):
        return "pattern" in key
    return count >= _MANY or bool(_OF_LAYERS.search(key))


def _may_speak(key: str, value: Any) -> bool:
    """Whether an entry with layers in its name may concern single layers."""
    if isinstance(value, (list, dict)):
        return bool(value)
    return _is_int(value) and value != 0 and not _HARMLESS.search(key)


def _is_by_number(key: str, value: Mapping[str, Any]) -> bool:
    return "layer" in key and bool(value) and all(str(each).isdigit() for each in value)


# Rules that derive a layer's kind from its number. A list that gives the kind takes precedence.


def _every(key: str, instead: str = "layer_types") -> Kind:
    def kind(config: Config, i: int) -> Any:
        every = _number(config, key)
        if config.get(instead) or every is None or every < 1:
            return None
        return (i + 1) % every == 0

    return kind


def _sliding(config: Config, i: int) -> Any:
    other_name = config.get("_sliding_window_pattern")
    if other_name is not None:
        config = {**config, "sliding_window_pattern": other_name}
    return _every("sliding_window_pattern")(config, i)


def _first(key: str) -> Kind:
    def kind(config: Config, i: int) -> Any:
        first = _number(config, key)
        return None if first is None else i < first

    return kind


def _windowed(config: Config, i: int) -> Any:
    if not config.get("use_sliding_window") or config.get("layer_types"):
        return None
    return _first("max_window_layers")(config, i)


def _at(period: str, offset: str = "", instead: str = "") -> Kind:
    def kind(config: Config, i: int) -> Any:
        every = _number(config, period)
        if config.get(instead) or every is None or every < 1:
            return None
        return i % every == config.get(offset, 0)

    return kind


def _sparse(config: Config, i: int) -> Any:
    """Qwen's mixtures of experts: which layers are sparse."""
    step = _number(config, "decoder_sparse_step")
    if step is None or step < 1:
        return None
    return i not in (config.get("mlp_only_layers") or ()) and (i + 1) % step == 0


def _shared(config: Config, i: int) -> Any:
    """Gemma 3n: the last layers reuse keys and values of earlier ones."""
    last = _number(config, "num_kv_shared_layers")
    return None if last is None else i >= (_count(config) or 0) - last


def _ernie(config: Config, i: int) -> Any:
    start, end, every = (
        _number(config, f"moe_layer_{each}") for each in ("start_index", "end_index", "interval")
    )
    if start is None or end is None:
        return None
    end = end if end >= 0 else (_count(config) or 0) - 1
    return start <= i <= end and (i + 1) % (every or 1) == 0


_RULES: dict[str, Kind] = {
    "sliding_window_pattern": _sliding,
    "full_attention_interval": _every("full_attention_interval"),
    "no_rope_layer_interval": _every("no_rope_layer_interval", "no_rope_layers"),
    "interleave_moe_layer_step": _every("interleave_moe_layer_step", "moe_layers"),
    "global_attn_every_n_layers": _at("global_attn_every_n_layers", instead="layer_types"),
    "decoder_sparse_step": _sparse,
    "first_k_dense_replace": _first("first_k_dense_replace"),
    "num_dense_layers": _first("num_dense_layers"),
    "max_window_layers": _windowed,
    "moe_layer_freq": _at("moe_layer_freq"),
    "attn_layer_period": _at("attn_layer_period", "attn_layer_offset"),
    "expert_layer_period": _at("expert_layer_period", "expert_layer_offset"),
    "num_kv_shared_layers": _shared,
    "moe_layer_start_index": _ernie,
}


def _as_first(key: str) -> Callable[[Config, Sequence[bool]], dict[str, Any] | None]:
    def say(config: Config, wanted: Sequence[bool]) -> dict[str, Any] | None:
        first = sum(wanted)
        return {key: first} if all(wanted[:first]) else None

    return say


def _as_types(other: str) -> Callable[[Config, Sequence[bool]], dict[str, Any]]:
    return lambda config, wanted: {
        "layer_types": ["full_attention" if full else other for full in wanted]
    }


def _as_last(config: Config, wanted: Sequence[bool]) -> dict[str, Any] | None:
    last = sum(wanted)
    return {"num_kv_shared_layers": last} if all(wanted[len(wanted) - last :]) else None


_OTHER_WAYS: dict[str, Callable[[Config, Sequence[bool]], dict[str, Any] | None]] = {
    "sliding_window_pattern": _as_types("sliding_attention"),
    "full_attention_interval": _as_types("linear_attention"),
    "global_attn_every_n_layers": _as_types("sliding_attention"),
    "no_rope_layer_interval": lambda _, wanted: {"no_rope_layers": [int(not w) for w in wanted]},
    "decoder_sparse_step": lambda _, wanted: {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, sparse in enumerate(wanted) if not sparse],
    },
    "first_k_dense_replace": _as_first("first_k_dense_replace"),
    "num_dense_layers": _as_first("num_dense_layers"),
    "max_window_layers": lambda config, wanted: (
        _as_first("max_window_layers")(config, wanted)
        or _as_types("sliding_attention")(config, wanted)
    ),
    "interleave_moe_layer_step": lambda _, wanted: {
        "moe_layers": [i for i, sparse in enumerate(wanted) if sparse]
    },
    "num_kv_shared_layers": _as_last,
}
