"""Layer numbers from tensor names: which integer in a name counts the blocks of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pymerge.errors import ConfigError
from pymerge.messages.words import some_names

# Usual names of a model's list of blocks; a list of a single block is recognised only by them.
_CONTAINERS = frozenset(
    {
        "layers",
        "layer",
        "h",
        "block",
        "blocks",
        "resblocks",
        "transformer_blocks",
        "decoder_layers",
        "encoder_layers",
    }
)
# Tensors before the first block. With slices they are taken from the first slice, and all others
# outside the blocks (final norm, heads) from the last.
_BEFORE = (
    "embed",
    "embd",
    "wte",
    "wpe",
    "ln_pre",
    "layernorm_pre",
    "relative_pe",
    "rotary_pos_emb",
    "shared.weight",
)
_AFTER = ("embed_out",)
# Of a config.json.
LAYER_COUNTS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_transformer_layers",
)


@dataclass(frozen=True)
class Place:
    """The place of a tensor: block `index` of the list named `stack`; `rest` is its name inside the
    block.
    """

    stack: str
    index: int
    rest: str

    def renumbered(self, index: int) -> str:
        """The tensor's name in block `index`."""
        return f"{self.stack}.{index}.{self.rest}"


@dataclass(frozen=True)
class Origin:
    """Where a layer of the result comes from: a model, as an index, and its number there."""

    model: int
    layer: int


class Layers:
    """The lists of blocks among a model's tensor names.

    A list of blocks is a name prefix followed by indices from 0 without a gap (`model.layers.0.`
    ...), or by any indices where the prefix ends in a usual name (layers, layer, h, blocks ...).
    The outermost list in a name counts, so experts inside a layer do not. A leading integer
    (`0.auto_model....`) does not count.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)
        indices: dict[str, set[int]] = {}
        for name in self.names:
            for place in _candidates(name):
                indices.setdefault(place.stack, set()).add(place.index)
        self._counts = {
            stack: max(seen) + 1
            for stack, seen in indices.items()
            if _usual(stack) or (len(seen) > 1 and max(seen) + 1 == len(seen))
        }
        self._places = {name: self._find(name) for name in self.names}
        in_use = {place.stack for place in self._places.values() if place is not None}
        self.counts = {stack: count for stack, count in self._counts.items() if stack in in_use}

    def _find(self, name: str) -> Place | None:
        return next((place for place in _candidates(name) if place.stack in self._counts), None)

    def place(self, name: str) -> Place | None:
        """The block that a tensor belongs to; None outside all lists of blocks."""
        return self._places[name]

    def position(self, name: str) -> float:
        """t of a gradient: 0 in the first block, 1 in the last or only one; 0 outside the
        blocks.
        """
        place = self._places[name]
        return 0.0 if place is None else position(place.index, self.counts[place.stack])

    def only_stack(self, reference: str) -> str:
        """The one list of blocks that slices are cut from. ConfigError where there is none or more
        than one.
        """
        usual = [stack for stack in self.counts if _usual(stack)]
        stacks = usual or list(self.counts)
        if len(stacks) == 1:
            return stacks[0]
        if not stacks:
            raise ConfigError(
                f"slices: no tensor name of {reference} has a layer number, so it cannot be sliced;"
                " use models"
            )
        raise ConfigError(
            f"slices: {reference} has {len(stacks)} lists of layers ({some_names(stacks)}); "
            "slicing a model of several modules is not there yet; use models"
        )


def position(index: int, count: int) -> float:
    """t of block `index` of `count`."""
    return index / (count - 1) if count > 1 else 1.0


def comes_first(name: str) -> bool:
    """Whether a tensor outside the blocks comes before them (embeddings) or after (final norm,
    heads).
    """
    return any(part in name for part in _BEFORE) and not any(part in name for part in _AFTER)


def _usual(stack: str) -> bool:
    return stack.rpartition(".")[2] in _CONTAINERS


def _candidates(name: str) -> list[Place]:
    parts = name.split(".")
    return [
        Place(".".join(parts[:i]), int(parts[i]), ".".join(parts[i + 1 :]))
        for i in range(1, len(parts) - 1)
        if parts[i].isascii() and parts[i].isdigit() and len(parts[i]) <= 9
    ]


def layer_count(config: Mapping[str, Any]) -> int | None:
    """The number of layers according to a config; None where it does not say."""
    for key in LAYER_COUNTS:
        count = config.get(key)
        if isinstance(count, int) and not isinstance(count, bool):
            return count
    nested = config.get("text_config")
    return layer_count(nested) if isinstance(nested, dict) else None
