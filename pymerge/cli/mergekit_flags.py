"""The options of `mergekit-yaml`, which `pymerge merge` takes so that its command lines run
unchanged: obeyed, without effect where they only say how to compute, or refused in words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from pymerge.cli.options import WholeNumber
from pymerge.errors import ConfigError

F = TypeVar("F", bound=Callable[..., Any])

# Options without effect, and why where that is not plain.
_WITHOUT_EFFECT = {
    "allow_crimes": "architectures are not compared; tensors are matched by name and shape",
    "lora_merge_cache": "no merged copy of a model and its adapter is written",
    "lora_merge_dtype": "adapters are applied in float32",
    "low_cpu_memory": "",
    "clone_tensors": "every tensor is written by itself",
    "trust_remote_code": "no code that a model brings is run",
    "lazy_unpickle": "",
    "verbosity": "",
    "read_to_gpu": "",
    "multi_gpu": "",
    "async_write": "",
    "write_threads": "",
}
_FLAGS = {
    "allow_crimes": "Allow mixing architectures.",
    "unsafe_truncate_embeddings": "Refused: choose a tokenizer in the recipe instead.",
    "cuda": "The same as --device cuda.",
    "low_cpu_memory": "Without effect.",
    "clone_tensors": "Without effect.",
    "trust_remote_code": "Without effect: no code that a model brings is run.",
    "lazy_unpickle": "Without effect.",
    "safe_serialization": "Write safetensors files, the only ones that are written.",
    "read_to_gpu": "Without effect.",
    "multi_gpu": "Without effect.",
    "async_write": "Without effect.",
}
_ON = ("safe_serialization",)
_OTHERS: dict[str, dict[str, Any]] = {
    "transformers_cache": {"metavar": "FOLDER", "help": "Where models of the hub are kept."},
    "lora_merge_cache": {"metavar": "FOLDER", "help": "Without effect."},
    "lora_merge_dtype": {"metavar": "DTYPE", "help": "Only float32 is taken."},
    "gpu_rich": {"is_flag": True, "help": "The same as --cuda."},
    "write_threads": {
        "type": WholeNumber(),
        "default": 1,
        "metavar": "N",
        "help": "Without effect.",
    },
    "verbosity": {"count": True, "help": "Without effect."},
}


def mergekit_flags(*, hidden: bool) -> Callable[[F], F]:
    """Adds those of mergekit-yaml's options that are not options of `pymerge merge` by themselves.

    hidden: leave them out of the command's help.
    """

    def add(function: F) -> F:
        for name, help_text in reversed(_FLAGS.items()):
            word = name.replace("_", "-")
            flag = click.option(
                f"--{word}/--no-{word}", default=name in _ON, hidden=hidden, help=help_text
            )
            function = flag(function)
        for name, option in reversed(_OTHERS.items()):
            words = [f"--{name.replace('_', '-')}", *(["-v"] if name == "verbosity" else [])]
            function = click.option(*words, hidden=hidden, **option)(function)
        return function

    return add


def settle(ctx: click.Context, options: dict[str, Any], *, verify: bool) -> str:
    """Take these options out of a command's: set `device` by them, and return a note on those that
    have no effect, or "".

    ConfigError for what would change the result and is not supported.
    """
    if options["unsafe_truncate_embeddings"]:
        raise ConfigError(
            "--unsafe-truncate-embeddings cuts off the last rows of larger vocabularies, whatever"
            " tokens they are, which is not supported; leave it out, and choose the tokenizer of"
            " the result with tokenizer_source in the recipe"
        )
    if not options["safe_serialization"]:
        raise ConfigError(
            "--no-safe-serialization: results are written as safetensors files only; leave it out"
        )
    if options["lora_merge_dtype"] not in (None, "float32"):
        raise ConfigError(
            f"--lora-merge-dtype {options['lora_merge_dtype']}: adapters are applied in float32,"
            " and the sum is rounded once; leave it out"
        )
    if options["trust_remote_code"] and verify:
        raise ConfigError(
            "--trust-remote-code: --verify loads the result without running code that it brings;"
            " leave out one of the two"
        )
    if (options["cuda"] or options["gpu_rich"]) and not _is_given(ctx, "device"):
        options["device"] = "cuda"
    note = _note(ctx, options)
    for name in {*_FLAGS, *_WITHOUT_EFFECT, "gpu_rich"}:
        options.pop(name)
    return note


def _note(ctx: click.Context, options: dict[str, Any]) -> str:
    words = []
    for name, reason in _WITHOUT_EFFECT.items():
        if _is_given(ctx, name) and options[name]:
            words.append(f"--{name.replace('_', '-')}{f' ({reason})' if reason else ''}")
    if not words:
        return ""
    listed = ", ".join(words[:-1]) + (" and " if len(words) > 1 else "") + words[-1]
    return f"{listed} {'have' if len(words) > 1 else 'has'} no effect here"


def _is_given(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) is not ParameterSource.DEFAULT


@contextmanager
def hub_cache(folder: str | None) -> Iterator[None]:
    """Inside, models of the hub are kept in this folder; None leaves that to huggingface_hub."""
    from pymerge.checkpoint.hub import cached_in

    with cached_in(None if folder is None else Path(folder)):
        yield
