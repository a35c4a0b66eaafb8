"""Models with an (IA)^3 adapter for their statistics: peft's, on the base that the adapter's config
names.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pymerge.checkpoint.adapter_config import VectorConfig
from pymerge.checkpoint.reader import open_model
from pymerge.errors import CheckpointError
from pymerge.rules.types import Task

_TASKS: dict[str, Task] = {
    "CAUSAL_LM": "causal-lm",
    "SEQ_2_SEQ_LM": "seq2seq",
    "SEQ_CLS": "sequence-classification",
    "TOKEN_CLS": "token-classification",
}
_PREFIX = "base_model.model."
# What peft has in memory and leaves out of its files: the adapter's name, and that of a copy.
_IN_MEMORY = re.compile(r"\.modules_to_save\.default(?=\.|$)|\.default$")


def base_of(folder: Path, config: VectorConfig) -> str:
    """The base's reference; a path may be relative to the adapter's folder. Raises CheckpointError
    where the config names none.
    """
    if config.base is None:
        raise CheckpointError(
            f"{folder}: its config names no base, with which its statistics are collected; set"
            " base_model_name_or_path there"
        )
    beside = folder / config.base
    return str(beside) if not Path(config.base).exists() and beside.exists() else config.base


def task_of_adapter(config: VectorConfig) -> Task | None:
    return _TASKS.get(config.task or "")


def tensors_of(folder: Path) -> frozenset[str]:
    """The names of the adapter's tensors."""
    opened = open_model(str(folder))
    opened.close()
    return frozenset(opened.tensors)


def brought_by(tensors: Collection[str]) -> frozenset[str]:
    """Names in the base of those tensors that an adapter has as a whole."""
    return frozenset(name.removeprefix(_PREFIX) for name in tensors)


def with_adapter(model: Any, folder: Path) -> Any:
    """peft's model. ValueError where peft is not installed, or cannot load the adapter."""
    try:
        import peft
    except ImportError as error:
        raise ValueError(
            "peft, which applies the adapter, is not installed; run: pip install peft"
        ) from error
    try:
        return peft.PeftModel.from_pretrained(model, folder).eval()
    except Exception as error:  # other shapes, other modules: whatever its use raises
        raise ValueError(
            f"the adapter {folder} cannot be loaded on its base ({str(error).strip()[:200]})"
        ) from error


def stored_in_adapter(name: str) -> str:
    """From a module's or parameter's name in peft's model to its name in the adapter's files."""
    return _IN_MEMORY.sub("", name)


def layers_of(tensors: Collection[str]) -> frozenset[str]:
    """Names of the modules that own the adapter's tensors, where peft keeps vectors in a list of
    its own that has the vectors' name.
    """
    modules = {name.rpartition(".")[0] for name in tensors if name.endswith((".weight", ".bias"))}
    return frozenset({*tensors, *modules})
