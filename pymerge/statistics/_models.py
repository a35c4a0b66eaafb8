"""Loading a transformers model for its statistics, and the names that its files give to its
modules.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pymerge.backends import native
from pymerge.checkpoint.adapter import is_adapter
from pymerge.checkpoint.adapter_config import read_vector_config
from pymerge.checkpoint.files import MAX_INDEX, exists, irregular, is_file, is_folder, read_json
from pymerge.checkpoint.header import read_header
from pymerge.checkpoint.hub import locate
from pymerge.checkpoint.identity import WatchedFile
from pymerge.checkpoint.types import TensorInfo
from pymerge.errors import CheckpointError
from pymerge.messages.arguments import argument
from pymerge.messages.words import counted, some_names
from pymerge.rules.types import Task
from pymerge.statistics._adapters import (
    base_of,
    brought_by,
    stored_in_adapter,
    task_of_adapter,
    tensors_of,
    with_adapter,
)

_CLASSES: dict[Task, str] = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "token-classification": "AutoModelForTokenClassification",
    "embedding": "AutoModel",
}
_MODEL_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".py", ".safetensors", ".bin")
_WEIGHTS = (".safetensors", ".bin")
_SLACK = 1 << 20  # parameters
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_ENDINGS: dict[str, Task] = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForMaskedLM": "masked-lm",
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
    "ForImageClassification": "image-classification",
}


@dataclass(frozen=True)
class LoadedModel:
    """A model with the folder that it comes from, its tokenizer (for images its processor), the
    task that it was loaded for and the longest input that it takes. why: it is that task. adapter:
    the names of the tensors of an (IA)^3 adapter, where the folder is one.
    """

    model: Any
    folder: Path
    tokenizer: Any
    task: Task
    max_length: int
    why: str
    adapter: frozenset[str] = frozenset()

    @property
    def rename(self) -> Callable[[str], str]:
        """From the names of modules and parameters to those in the folder's files."""
        return stored_in_adapter if self.adapter else stored_name(self.model, self.folder)


def load_model(name: str, task: Task | None, device: str | None, dtype: str) -> LoadedModel:
    """Load a folder or hub name for a task, by default the one of its architecture; an (IA)^3
    adapter on the base that its config names, by default for its task.

    ValueError where the folder lacks the task's head, RuntimeError where transformers is not
    installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            'transformers is not installed; run: pip install "pymerge-kernels[transformers]"'
        ) from error
    place = _place(device)
    folder = locate(name)
    vectors = read_vector_config(folder) if is_adapter(folder) else None
    if vectors is not None:
        base, own = base_of(folder, vectors), task_of_adapter(vectors)
        tensors = tensors_of(folder)
        loaded = _load(transformers, base, task or own, place, dtype, brought_by(tensors))
        why = loaded.why if task or own is None else f"the adapter is for {vectors.task}"
        model = with_adapter(loaded.model, folder)
        return replace(loaded, model=model, folder=folder, why=why, adapter=tensors)
    return _load(transformers, name, task, place, dtype)


def _load(
    transformers: Any,
    name: str,
    task: Task | None,
    place: torch.device,
    dtype: str,
    brought: Collection[str] = (),
) -> LoadedModel:
    """A plain model. brought: tensors that it may lack, since an adapter has them."""
    folder = locate(name)
    _check_folder(folder)
    weights = [WatchedFile(path) for path in sorted(folder.iterdir()) if path.suffix in _WEIGHTS]
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except Exception as error:  # a config of wrong types: whatever its use raises
        raise ValueError(
            f"model {name!r} is not a transformers folder ({_first_line(error)})"
        ) from error
    architectures = getattr(config, "architectures", None) or []
    if not isinstance(architectures, list) or not all(isinstance(a, str) for a in architectures):
        raise ValueError(
            f"{name}: architectures in its config is {reprlib.repr(architectures)}, not a list of"
            " names; download it again"
        )
    why = "as asked" if task else f"the model is a {some_names(architectures)}"
    task = task or task_of(architectures, bool(getattr(config, "is_encoder_decoder", False)))
    if task is None:
        kind = f"is a {some_names(architectures)}" if architectures else "names no architecture"
        raise ValueError(
            f"{name} {kind}, whose loss is not known; pass --task ({', '.join(_CLASSES)}), or use"
            " the Python API with a loss of your own"
        )
    stored = "auto" if place.type != "cpu" else "float32"
    chosen = {"dtype": stored if dtype == "auto" else dtype}
    lost = native.lost_pages()
    try:
        with _quietly():
            kind = _class_of(transformers, config, task, architectures)
            _check_fit(kind, config, folder)
            model, info = kind.from_pretrained(folder, output_loading_info=True, **chosen)
            _unmap(model)
    except CheckpointError:
        raise
    except Exception as error:  # files missing, of other shapes, damaged
        for file in weights:
            file.check()
        raise ValueError(
            f"the weights of {name} cannot be loaded ({_first_line(error)})"
        ) from error
    for file in weights:
        file.check()
    if native.lost_pages() != lost:
        raise CheckpointError(
            f"{folder}: a file could not be read to its end; look for errors of its disk (dmesg),"
            " or copy it again"
        )
    missing = sorted({key for key in info["missing_keys"] if "pooler" not in key} - {*brought})
    if missing:
        raise ValueError(
            f"{name} lacks {len(missing)} tensor{'s' * (len(missing) > 1)} that {task} needs, among"
            f" them {missing[0]}: its statistics would be those of random weights; pass another"
            f" --task (the model is a {some_names(architectures or ['?'])})"
        )
    if task == "image-classification":
        processor = _image_processor(transformers, name, folder)
        return LoadedModel(model.to(place), folder, processor, task, 1, why)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # tokenizers raises Exception itself
        raise ValueError(
            f"{name} has no tokenizer that transformers can load ({_first_line(error)}); copy the"
            " tokenizer's files of the model that it was fine-tuned from into it"
        ) from error
    if tokenizer.pad_token is None:
        # Never seen, since the mask leaves it out; decoders with a classification head look for its
        # id.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    longest = getattr(config, "max_position_embeddings", None) or getattr(
        config, "n_positions", None
    )
    if not isinstance(longest, int) or longest < 1:  # XLNet has -1: no limit
        longest = 1 << 30
    return LoadedModel(model.to(place), folder, tokenizer, task, longest, why)


@contextmanager
def _quietly() -> Iterator[None]:
    """transformers without progress bars, and without its report of missing tensors, which
    `load_model` makes an error.
    """
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0].rstrip(": ")
    return text or type(error).__name__


def _check_fit(kind: Any, config: Any, folder: Path) -> None:
    """That the files hold the model of the config, before transformers takes memory for all that
    the config describes. Raises CheckpointError.
    """
    if getattr(config, "quantization_config", None) is not None:
        return
    with torch.device("meta"):
        build = getattr(kind, "from_config", None) or kind._from_config
        expected = dict(_named_tensors(build(config)))
    number = sum(tensor.numel() for tensor in {id(t): t for t in expected.values()}.values())
    held = max(
        sum(path.stat().st_size for path in folder.glob(f"*{suffix}")) for suffix in _WEIGHTS
    )
    remedy = "its config and its weights are of different models: download both again"
    if held and number > 2 * held + _SLACK:  # no dtype has less than half a byte
        raise CheckpointError(
            f"{folder}: config.json describes a model of {number:,} parameters, and the files hold"
            f" {held:,} bytes; {remedy}"
        )
    other = [
        f"{name} is {list(shape)} in the files and {list(expected[name].shape)} by the config"
        for name, shape in ((info.name, info.shape) for info in _tensors(folder))
        if name in expected and tuple(expected[name].shape) != shape
    ]
    if other:
        raise CheckpointError(f"{folder}: {some_names(other)}; {remedy}")


def _image_processor(transformers: Any, name: str, folder: Path) -> Any:
    try:
        with _quietly():
            return transformers.AutoImageProcessor.from_pretrained(folder)
    except Exception as error:  # files missing or damaged, libraries missing
        raise ValueError(
            f"{name} has no image processor that transformers can load ({_first_line(error)}); copy"
            " preprocessor_config.json of the model that it was fine-tuned from into it, and"
            " install pillow"
        ) from error


def _unmap(model: nn.Module) -> None:
    """Take the weights out of the mapped files: what happens to these during the run is no matter
    then.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def _check_folder(folder: Path) -> None:
    """What transformers would wait for, or fill the memory with. It opens whatever has a model
    file's name, a named pipe too.
    """
    if not is_folder(folder):
        raise CheckpointError(f"{folder}: is a file; name the folder of a transformers model")
    for path in sorted(folder.iterdir()):
        reason = None if is_folder(path) else irregular(path)
        if reason is not None and path.suffix in _MODEL_SUFFIXES:
            raise CheckpointError(f"{path}: {reason}; put the file itself there, or remove it")
    config = folder / "config.json"
    stored = sum(1 for _ in _tensor_names(folder))
    content = read_json(config) if stored and exists(config) else {}
    for nested in (content, *(each for each in content.values() if isinstance(each, dict))):
        for key in _LAYER_COUNTS:  # transformers makes so many modules before it looks at the files
            count = nested.get(key)
            if isinstance(count, (int, float)) and count > stored:
                raise CheckpointError(
                    f"{config}: has {key} {reprlib.repr(count)}, and the files hold {stored}"
                    " tensors; download it again"
                )


def _place(device: str | None) -> torch.device:
    """The device of that name; ValueError where torch does not have it."""
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(
            f"{argument('device', device)} is not a device of torch; pass cpu or cuda"
        ) from None
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"{argument('device', device)} is not there: torch {torch.__version__} sees"
            f" {counted(torch.cuda.device_count(), 'CUDA device')}; pass cpu, or see `pymerge"
            " doctor`"
        )
    return place


def task_of(architectures: list[str], encoder_decoder: bool) -> Task | None:
    """The task of an architecture's name; None where it does not tell."""
    for architecture in architectures:
        if architecture.endswith(("ForConditionalGeneration", "MTModel")):
            return "seq2seq" if encoder_decoder else "causal-lm"
        for ending, task in _ENDINGS.items():
            if architecture.endswith(ending):
                return task
    return None


def _class_of(transformers: Any, config: Any, task: Task, architectures: list[str]) -> Any:
    """The class to load: the model's own where that is one of the task, as of a language model that
    also sees.
    """
    for architecture in architectures:
        own = getattr(transformers, architecture, None)
        several = architecture.endswith("ForConditionalGeneration")
        if task == "causal-lm" and several and own is not None:
            return own
    return getattr(transformers, _CLASSES[task])


def stored_name(model: Any, folder: str | Path) -> Callable[[str], str]:
    """From a module's or parameter's name to its name in the model's files, which may lack or have
    the base model's prefix.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    stored = set(_tensor_names(Path(folder)))
    own = [name for name, _ in _named_tensors(model)]

    def same(name: str) -> str:
        return name

    def shorter(name: str) -> str:
        return name.removeprefix(prefix)

    def longer(name: str) -> str:
        return prefix + name if name else name

    if prefix == "." or not stored:
        return same
    return max(
        (same, shorter, longer), key=lambda rename: sum(rename(name) in stored for name in own)
    )


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return model.named_parameters(remove_duplicate=False)


def _tensor_names(folder: Path) -> Iterator[str]:
    """Names of the tensors in a folder's safetensors files; none for other formats."""
    index = folder / "model.safetensors.index.json"
    if is_file(index):
        names = read_json(index, MAX_INDEX).get("weight_map")
        yield from names if isinstance(names, dict) else ()
        return
    yield from (info.name for info in _tensors(folder))


def _tensors(folder: Path) -> Iterator[TensorInfo]:
    for path in sorted(folder.glob("*.safetensors")):
        yield from (entry.info for entry in read_header(path))
