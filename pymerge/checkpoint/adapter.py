"""An adapter opened for reading: which tensors of its files are factors of which module's update,
and which replace a tensor of the base.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pymerge.checkpoint.adapter_config import CONFIG, WEIGHTS, AdapterConfig, read_config
from pymerge.checkpoint.files import exists, is_folder
from pymerge.checkpoint.hub import locate
from pymerge.checkpoint.identity import WatchedFile
from pymerge.checkpoint.reader import OpenModel, open_file
from pymerge.checkpoint.stored import InputFile, StoredTensor
from pymerge.checkpoint.tokens import FILES
from pymerge.dtypes import INTEGERS, MERGEABLE, elements
from pymerge.errors import CheckpointError
from pymerge.messages.words import some_names

_PREFIX = "base_model.model."  # peft's own, around the model
# A factor's name: the module, the factor, the adapter's name in memory, what a layer calls it.
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<factor>lora_(?:A|B|down|up|embedding_A|embedding_B|magnitude_vector))"
    r"(?:\.(?!weight$|bias$)[^.]+)?(?P<end>\.weight|\.bias)?"
)
_ALPHA = re.compile(r"(?P<module>.+)\.alpha")
# What is left of other kinds of adapters, or of other parts of this kind.
_UNKNOWN = re.compile(
    r"(^|[._])"
    r"(lora_\w+|lora|hada_\w+|lokr_\w+|dora_scale|vera_lambda_[bd]|b?oft_\w+|token_adapter)"
    r"([._]|$)"
)
_WRAPPERS = re.compile(r"\.(?:base_layer|modules_to_save(?:\.[^.]+(?=\.[^.]+$))?)(?=\.)")
# What peft keeps of the base beside a module that takes its place.
_ORIGINAL = ".original_module."
_COPY = ".modules_to_save."
_KOHYA = re.compile(r"(?P<group>lora_(?:unet|transformer|prior|te\d*))_(?P<name>.+)")
_NUMBERS = (*MERGEABLE, *(name for name in INTEGERS if name != "bool"))
_NAMES = {"lora_down": "lora_A", "lora_up": "lora_B"}


@dataclass
class Update:
    """The factors of one module: s B A is added to its weight.

    a: (r, d_in), or with the sizes of a convolution's kernel behind; of an embedding (r, rows).
    b: (d_out, r), with ones behind, or (d, r). magnitude: DoRA's, one for each output.
    bias: is added to the module's bias, times s.
    """

    module: str
    a: StoredTensor
    b: StoredTensor
    scale: float
    embeds: bool = False
    magnitude: StoredTensor | None = None
    bias: StoredTensor | None = None

    @property
    def rank(self) -> int:
        return self.a.info.shape[0]


@dataclass
class OpenAdapter:
    """An adapter whose headers are read.

    folder: None for a single file. updates: by module, under the adapter's own names. replaced:
    tensors that take the place of the base's. groups: for kohya's files, of which model each module
    is a part (`lora_unet`); the modules' names have underscores for dots then.
    """

    reference: str
    folder: Path | None
    config: AdapterConfig | None
    files: tuple[InputFile, ...]
    beside: tuple[WatchedFile, ...]
    updates: dict[str, Update] = field(default_factory=dict)
    replaced: dict[str, StoredTensor] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)

    @property
    def base(self) -> str | None:
        """The base's reference, by the adapter's own config."""
        return None if self.config is None else self.config.base


class AdaptedModel(OpenModel):
    """A base with an adapter: `tensors` are those of the sum. speaker: the adapter's folder, where
    it has a tokenizer; taken away where that is the base's.
    """

    def __init__(
        self,
        reference: str,
        base: OpenModel,
        adapter: OpenAdapter,
        config: Mapping[str, Any],
        tensors: Mapping[str, StoredTensor],
        notes: Sequence[str],
    ) -> None:
        super().__init__(
            reference,
            base.folder if base.folder is not None else base.files[0].path,
            config,
            (*base.files, *adapter.files),
            tensors,
            (*base.notes, *notes),
            (*base.beside, *adapter.beside),
            base.metadata,
        )
        self.base = base
        self.adapter = adapter
        self.speaker: OpenModel | None = None
        if adapter.folder is not None:
            self.speaker = OpenModel(reference, adapter.folder, {}, adapter.files, {})


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter: its config, and no model of which it could be a part."""
    if is_folder(path):
        models = ("model.safetensors", "pytorch_model.bin")
        names = [*models, *(f"{name}.index.json" for name in models)]
        return exists(path / CONFIG) and not any(exists(path / name) for name in names)
    return path.name in WEIGHTS and exists(path.with_name(CONFIG))


def open_adapter(reference: str) -> OpenAdapter:
    """Locate an adapter and read its headers: a folder as peft writes it, or a file with its alphas
    in it, as kohya's tools write it. Raises CheckpointError.
    """
    path = locate(reference)
    folder = path if is_folder(path) else path.parent if is_adapter(path) else None
    weights, config, files = path, None, []
    if folder is not None:
        if not exists(folder / CONFIG):
            raise CheckpointError(
                f"{folder}: holds no adapter: there is no {CONFIG}, which has the scale of its"
                " updates; download it too"
            )
        files.append(InputFile(folder / CONFIG))  # before it is read, so that changes are noticed
        config = read_config(folder / CONFIG)
        found = next((folder / name for name in WEIGHTS if exists(folder / name)), None)
        if found is None:
            raise CheckpointError(
                f"{folder}: holds no weights of an adapter: neither {' nor '.join(WEIGHTS)};"
                " download them too"
            )
        weights = found
    elif path.suffix not in (".safetensors", ".bin", ".pt", ".pth", ".ckpt"):
        raise CheckpointError(f"{path}: is neither an adapter's folder nor a file of tensors")
    file, tensors, _, _ = open_file(weights)
    opened = OpenAdapter(
        reference,
        folder,
        config,
        (file, *files),
        tuple(WatchedFile(folder / n) for n in FILES if exists(folder / n)) if folder else (),
    )
    _sort(opened, {tensor.info.name: tensor for tensor in tensors}, weights)
    return opened


def _sort(opened: OpenAdapter, tensors: Mapping[str, StoredTensor], path: Path) -> None:
    """Tell factors, alphas and whole tensors apart. Raises CheckpointError for what is neither."""
    kohya = any(_KOHYA.fullmatch(name) for name in tensors)
    factors: dict[str, dict[str, StoredTensor]] = {}
    alphas: dict[str, StoredTensor] = {}
    originals: dict[str, StoredTensor] = {}
    unknown: list[str] = []
    for name, tensor in tensors.items():
        plain = name.removeprefix(_PREFIX)
        alpha = _ALPHA.fullmatch(plain) if opened.config is None else None
        if not name.isprintable() or tensor.info.dtype not in (_NUMBERS if alpha else MERGEABLE):
            unknown.append(name)
        elif found := _FACTOR.fullmatch(plain):
            module = _WRAPPERS.sub("", f"{found['module']}.")[:-1]
            part = _NAMES.get(found["factor"], found["factor"])
            part += ".bias" if found["end"] == ".bias" else ""
            _once(factors.setdefault(module, {}), part, tensor, path)
        elif alpha:
            _once(alphas, alpha["module"], tensor, path)
        elif _ORIGINAL in plain:
            continue
        elif kohya or _UNKNOWN.search(plain):
            unknown.append(name)
        else:
            # Of what is there as trained and as the base has it, the trained copy counts.
            held = opened.replaced if _COPY in plain else originals
            _once(held, _WRAPPERS.sub("", plain), tensor, path)
    opened.replaced = originals | opened.replaced
    if unknown:
        raise CheckpointError(
            f"{path}: holds an adapter that cannot be merged here ({some_names(map(repr, unknown))}"
            " is none of LoRA's two factors of an update, in a dtype that can be merged); merge it"
            " into its model with the tool that made it, and name the result"
        )
    for module, parts in factors.items():
        opened.updates[module] = _update(opened, module, parts, alphas.get(module), path)
    if kohya:
        opened.groups = {module: _KOHYA.sub(r"\g<group>_", module) for module in opened.updates}
    if not opened.updates and not opened.replaced:
        raise CheckpointError(f"{path}: holds no tensors")


def _once(held: dict[str, StoredTensor], name: str, tensor: StoredTensor, path: Path) -> None:
    if name in held:
        raise CheckpointError(
            f"{path}: holds several adapters ({tensor.info.name}); save each by itself"
        )
    held[name] = tensor


def _update(
    opened: OpenAdapter,
    module: str,
    parts: dict[str, StoredTensor],
    alpha: StoredTensor | None,
    path: Path,
) -> Update:
    embeds = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    a, b = (parts.pop(f"lora_{'embedding_' * embeds}{one}", None) for one in "AB")
    if a is None or b is None:
        lacks = "A (or lora_down)" if a is None else "B (or lora_up)"
        raise CheckpointError(f"{path}: {module} has no lora_{lacks}; download it again")
    magnitude = parts.pop("lora_magnitude_vector", None)
    bias = parts.pop("lora_B.bias", None)
    shapes = a.info.shape, b.info.shape
    fits = all(len(shape) > 1 and min(shape) > 0 for shape in shapes)
    fits = fits and shapes[0][0] == shapes[1][1] and max([1, *shapes[1][2:]]) == 1
    if parts or not fits or (embeds and len(shapes[0]) + len(shapes[1]) != 4):
        raise CheckpointError(
            f"{path}: the factors of {module} are {list(shapes[0])} and {list(shapes[1])}, which"
            f" have no product that is its update{' (' * bool(parts)}{some_names(parts)}"
            f"{')' * bool(parts)}; a grouped convolution's are among them: merge those with peft"
            " (merge_and_unload)"
        )
    rank = shapes[0][0]
    config = opened.config
    if config is not None:
        try:
            due, scale = config.rank_of(module), config.scale_of(module)
        except ValueError as error:
            raise CheckpointError(
                f"{path}: the scale of {module[:40]}... is not known by its {CONFIG}: {error};"
                " write the names of modules there"
            ) from None
        if due != rank:
            raise CheckpointError(
                f"{path}: {module} has factors of rank {rank}, and by its {CONFIG} it has rank"
                f" {due}; that belongs to another adapter"
            )
        if config.dora is not (magnitude is not None):
            has, says = ("no ", "sets") if magnitude is None else ("a ", "does not set")
            raise CheckpointError(
                f"{path}: {module} has {has}lora_magnitude_vector, and its {CONFIG} {says} use_dora"
            )
    elif alpha is None and not _KOHYA.fullmatch(module):
        raise CheckpointError(
            f"{path}: holds an adapter without its {CONFIG}, and no alpha for {module}, so that the"
            " scale of its updates is not known; put the config beside it, and name the folder"
        )
    else:
        scale = _alpha(alpha, rank, path, module) / rank
    return Update(module, a, b, scale, embeds, magnitude, bias)


def _alpha(alpha: StoredTensor | None, rank: int, path: Path, module: str) -> float:
    """kohya's, an integer where nobody gave one: where it is missing or 0, it is the rank."""
    if alpha is None:
        return float(rank)
    from pymerge.checkpoint.low_rank import values_of

    one = elements(alpha.info.shape) == 1  # else it is not read, however large it is
    value = float(values_of(alpha).reshape(-1)[0]) if one else float("nan")
    if not abs(value) < float("inf"):
        raise CheckpointError(f"{path}: the alpha of {module} is not a finite number")
    return value or float(rank)
