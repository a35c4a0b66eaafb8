"""Loads a merged model with transformers, in the subprocess that `verify` starts.

Loads a folder offline, looks for missing weights, and runs the model briefly. Prints one line of
JSON: {"done": [sentences], "problems": [sentences]}. The process keeps to a memory limit and runs
no code from the folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pymerge.checkpoint.contents import CONFIG
from pymerge.messages.words import counted, some_names

_TOKENS = 4  # that are generated
_TEXT = "The merged model"
_OWN = {"local_files_only": True, "trust_remote_code": False}


class _Failed(Exception):
    """Holds a sentence that says what is wrong."""


def check(folder: Path) -> dict[str, list[str]]:
    """{"done": what was found right, "problems": what is wrong}."""
    done: list[str] = []
    try:
        transformers = _transformers()
        config = _config(transformers, folder)
        model = _loaded(transformers, folder, config, done)
        ids = _ids(transformers, folder, config, done)
        done.append(_run(model, config, ids))
    except _Failed as error:
        return {"done": done, "problems": [str(error)]}
    return {"done": done, "problems": []}


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise _Failed(
            f"transformers cannot be imported ({error}); pip install transformers, with which the"
            " model is loaded"
        ) from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _config(transformers: Any, folder: Path) -> Any:
    path = folder / CONFIG
    if not path.is_file():
        raise _Failed(f"there is no {CONFIG}, without which transformers loads nothing")
    try:
        return transformers.AutoConfig.from_pretrained(folder, **_OWN)
    except Exception as error:
        raise _Failed(f"transformers cannot read {CONFIG}: {_words(error)}") from None


def _loaded(transformers: Any, folder: Path, config: Any, done: list[str]) -> Any:
    given = getattr(config, "architectures", None) or []
    named = str(given[0]) if isinstance(given, list) else str(given)
    kind = getattr(transformers, named, None) if given else transformers.AutoModel
    if not isinstance(kind, type) or not hasattr(kind, "from_pretrained"):
        kind = None  # a function, a module, or no model
    version = transformers.__version__
    if kind is None and getattr(config, "auto_map", None):
        raise _Failed(f"its architecture, {named}, is code of the folder's own, which is not run")
    if kind is None:
        raise _Failed(
            f"transformers {version} does not know its architecture, {named}; verify it with a"
            " release that does"
        )
    dtype = "dtype" if int(version.split(".")[0]) > 4 else "torch_dtype"
    try:
        model, info = kind.from_pretrained(
            folder, config=config, output_loading_info=True, **{dtype: "auto"}, **_OWN
        )
    except Exception as error:
        raise _Failed(f"transformers cannot load it as {kind.__name__}: {_words(error)}") from None
    missing, sizes = sorted(info["missing_keys"]), info["mismatched_keys"]
    if missing:
        raise _Failed(
            f"{kind.__name__} has {counted(len(missing), 'tensor')} that the weights lack, and"
            " transformers"
            f" fills {'it' if len(missing) == 1 else 'them'} at random: {some_names(missing)}"
        )
    if sizes:
        names = some_names(each if isinstance(each, str) else each[0] for each in sizes)
        raise _Failed(f"{kind.__name__} has tensors of other shapes than the weights: {names}")
    if info.get("error_msgs"):
        raise _Failed(f"{kind.__name__}: {some_names(info['error_msgs'])}")
    extra = sorted(info["unexpected_keys"])
    unused = f"; it does not use {len(extra)}: {some_names(extra)}" if extra else ""
    done.append(
        f"{kind.__name__} loads in transformers {version}, and no tensor is missing{unused}"
    )
    return model.eval()


def _ids(transformers: Any, folder: Path, config: Any, done: list[str]) -> list[int]:
    """Token ids for a short text, from the tokenizer where there is one."""
    rows = _size(config, "vocab_size") or 8
    if any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json")):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **_OWN)
            ids = list(tokenizer(_TEXT)["input_ids"])
        except Exception as error:
            raise _Failed(f"transformers cannot load its tokenizer: {_words(error)}") from None
        outside = [number for number in ids if not 0 <= number < rows]
        if outside:
            raise _Failed(
                f"its tokenizer gives the id {outside[0]}, and the vocabulary has {rows} rows"
            )
        done.append(f"its tokenizer loads ({type(tokenizer).__name__})")
        if ids:
            return ids
    return [min(number, rows - 1) for number in (1, 2, 3)]


def _size(config: Any, name: str) -> int | None:
    for level in (config, *(getattr(config, n, None) for n in ("text_config", "vision_config"))):
        value = getattr(level, name, None)
        if isinstance(value, int):
            return value
    return None


def _run(model: Any, config: Any, ids: list[int]) -> str:
    import torch

    inputs = _inputs(model, config, ids)
    if inputs is None:
        return f"it was not run: {type(model).__name__} takes inputs of a kind that is not known"
    try:
        with torch.inference_mode():
            if getattr(model, "can_generate", lambda: False)():
                made = model.generate(
                    **inputs, max_new_tokens=_TOKENS, min_new_tokens=_TOKENS, do_sample=False
                )
                inputs |= _decoder(model, config, ids, inputs)
                _check_finite(model(**inputs))
                return f"it generates ({_TOKENS} tokens, {made.shape[-1]} in all)"
            inputs |= _decoder(model, config, ids, inputs)
            _check_finite(model(**inputs))
    except _Failed:
        raise
    except Exception as error:
        raise _Failed(f"it loads and does not run: {_words(error)}") from None
    return "it computes, and all of the results are finite"


def _inputs(model: Any, config: Any, ids: list[int]) -> dict[str, Any] | None:
    """Inputs for the usual kinds of models: text, images, sound; a text and an image for both."""
    import inspect

    import torch

    taken = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    found: dict[str, Any] = {}
    text = torch.tensor([ids], dtype=torch.int64, device=model.device)
    both = not hasattr(config, "text_config") or not model.can_generate()
    if main == "input_ids" or ("input_ids" in taken and hasattr(config, "text_config")):
        found = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    if main == "pixel_values" or ("pixel_values" in taken and both and found):
        size = getattr(getattr(config, "vision_config", config), "image_size", 224)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        channels = _size(config, "num_channels") or 3
        found["pixel_values"] = torch.zeros(
            1, channels, height, width, dtype=model.dtype, device=model.device
        )
    elif main == "input_features":
        frames = 2 * (_size(config, "max_source_positions") or 500)
        bins = _size(config, "num_mel_bins") or 80
        found["input_features"] = torch.zeros(
            1, bins, frames, dtype=model.dtype, device=model.device
        )
    elif main == "input_values":
        found["input_values"] = torch.linspace(
            -1, 1, 16000, dtype=model.dtype, device=model.device
        )[None]
    return {name: value for name, value in found.items() if name in taken or name == main} or None


def _decoder(model: Any, config: Any, ids: list[int], inputs: dict[str, Any]) -> dict[str, Any]:
    import torch

    if not getattr(config, "is_encoder_decoder", False):
        return {}
    return {"decoder_input_ids": torch.tensor([ids], dtype=torch.int64, device=model.device)}


def _check_finite(output: Any) -> None:
    import torch

    for name, value in output.items() if hasattr(output, "items") else ():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            if not bool(value.isfinite().all()):
                raise _Failed(f"its {name} are NaN or infinite: weights are damaged, or overflow")


def _words(error: BaseException) -> str:
    """The first lines of an exception's text."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{'...' if len(text) > 300 else ''}"


def main(folder: str, memory: str) -> None:
    """The subprocess: limits itself to `memory` bytes and prints the result as its last line."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = int(memory) if hard == resource.RLIM_INFINITY else min(int(memory), hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        found = check(Path(folder))
    except MemoryError:
        found = {"done": [], "problems": ["there is not enough memory to load it"]}
    sys.stdout.write("\n" + json.dumps(found) + "\n")
