"""A model opened for reading: which file holds which tensor, and access to its bytes."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pymerge.checkpoint import adapter_config
from pymerge.checkpoint.files import (
    MAX_INDEX,
    exists,
    irregular,
    is_file,
    is_folder,
    read_json,
    stays_inside,
)
from pymerge.checkpoint.header import read_all
from pymerge.checkpoint.hub import locate
from pymerge.checkpoint.identity import WatchedFile
from pymerge.checkpoint.other_formats import is_pointer, other_format, why_empty
from pymerge.checkpoint.stored import FileTensor, InputFile, StoredTensor
from pymerge.checkpoint.tokens import FILES
from pymerge.checkpoint.training_folders import distributed_in
from pymerge.checkpoint.types import ModelHeader
from pymerge.errors import CheckpointError, MergeError
from pymerge.messages.words import some_names

# In the order in which transformers looks; diffusers uses the second name.
_DIFFUSERS = "diffusion_pytorch_model"
_SINGLE = ("model.safetensors", f"{_DIFFUSERS}.safetensors")
_PICKLED = ("pytorch_model.bin", f"{_DIFFUSERS}.bin")
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
ADAPTER = "adapter_model"  # peft's
# Files in which GPTQ, AWQ and ModelOpt describe quantised weights, beside config.json.
QUANTISATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")


class OpenModel:
    """A model whose headers are read. `tensors` is in the order of files and of bytes within them.

    beside: its files that hold no tensors and that a merge follows. metadata: the free text of its
    safetensors file, where it is in one alone. distributed: it is a checkpoint of
    torch.distributed.
    """

    def __init__(
        self,
        reference: str,
        path: Path,
        config: Mapping[str, Any],
        files: Sequence[InputFile],
        tensors: Mapping[str, StoredTensor],
        notes: Sequence[str] = (),
        beside: Sequence[WatchedFile] = (),
        metadata: Mapping[str, bytes] | None = None,
        distributed: bool = False,
    ) -> None:
        self.reference = reference
        self.folder = path if is_folder(path) else None
        self.files = tuple(files)
        self.tensors = tensors
        self.notes = tuple(notes)
        self.beside = tuple(beside)
        self.metadata = dict(metadata or {})
        self.distributed = distributed
        self.header = ModelHeader(
            reference,
            {n: t.info for n, t in tensors.items()},
            config,
            quantisation_files=tuple(
                name for name in QUANTISATION_FILES if self.folder and exists(self.folder / name)
            ),
            shared=_shared(tensors),
            adapter=self.stem == ADAPTER,
        )
        self.statistics: Mapping[str, StoredTensor] = {}  # the sums of its statistics file, by key

    @property
    def places(self) -> tuple[Path, ...]:
        """Paths that must not be overwritten: the folder, and the files that links lead to."""
        files = tuple(file.path for file in (*self.files, *self.beside))
        return files if self.folder is None else (self.folder, *files)

    @property
    def stem(self) -> str:
        """What the names of its weight files begin with, by which its library finds them."""
        first = self.files[0].path.name if self.folder is not None and self.files else ""
        return next((stem for stem in (_DIFFUSERS, ADAPTER) if first.startswith(stem)), "model")

    def check(self) -> None:
        """Raise CheckpointError where a file changed since the model was opened."""
        for file in (*self.files, *self.beside):
            file.check()

    def close(self) -> None:
        for file in self.files:
            file.close()


def open_model(reference: str, *, needs_weights: bool = True) -> OpenModel:
    """Locate a model and read its headers. Raises CheckpointError.

    needs_weights: whether a folder with nothing but a tokenizer is an error.
    """
    path = locate(reference)
    notes: list[str] = []
    beside: list[WatchedFile] = []
    if is_folder(path):
        beside = [WatchedFile(path / n) for n in ("config.json", *FILES) if is_file(path / n)]
        config = _config(path)
        try:
            files, names = _files_of(path)
        except CheckpointError:
            if (place := distributed_in(path)) is not None:
                return _training_checkpoint(reference, path, place, config, beside)
            if needs_weights or not any(exists(path / name) for name in FILES):
                raise
            files, names, needs_weights = [], None, False
        if any(file.name in adapter_config.WEIGHTS for file in files):
            beside.append(WatchedFile(path / adapter_config.CONFIG))
    else:
        if path.suffix not in _SUFFIXES:
            raise CheckpointError(
                f"{path}: is neither a model folder nor a {', '.join(_SUFFIXES)} file"
                f"{other_format(path.name)}"
            )
        config, files, names = {}, [path], None
    tensors: dict[str, StoredTensor] = {}
    metadata: Mapping[str, bytes] = {}
    inputs = []
    problems: list[str] = []
    opened = []
    for file in files:
        try:
            input_file, found, metadata, remarks = open_file(file)
        except MergeError as error:
            problems.extend(error.problems)
            continue
        inputs.append(input_file)
        notes += remarks
        opened.append((file, found))
    homes, moved = _homes(names or {}, opened)
    notes += moved
    for file, found in opened:
        problems += _odd_names(file, [tensor.info.name for tensor in found])
        held = {tensor.info.name: tensor for tensor in found}
        if names is not None:
            listed = {name for name, home in homes.items() if home == file}
            left_out, shard_notes, wrong = _against_index(file, held, listed, homes, tensors)
            notes += shard_notes
            problems += wrong
            held = {name: tensor for name, tensor in held.items() if name not in left_out}
        tensors |= held
    if problems:
        raise CheckpointError(problems)
    if not tensors and needs_weights:
        raise CheckpointError(f"{path}: holds no tensors")
    if len(files) > 1:
        metadata = {}
    return OpenModel(reference, path, config, inputs, tensors, notes, beside, metadata)


def _training_checkpoint(
    reference: str,
    path: Path,
    place: Path,
    config: Mapping[str, Any],
    beside: Sequence[WatchedFile],
) -> OpenModel:
    """A checkpoint of torch.distributed, which lies in `place`. Imports NumPy, which plain folders
    do without.
    """
    from pymerge.checkpoint.distributed import open_distributed

    found = open_distributed(place)
    problems = _odd_names(path, found.tensors)
    if problems:
        raise CheckpointError(problems)
    return OpenModel(
        reference, path, config, found.files, found.tensors, found.notes, beside, distributed=True
    )


def _odd_names(path: Path, names: Iterable[str]) -> list[str]:
    odd = [name for name in names if not name.isprintable()]
    if not odd:
        return []
    # Such names could control a terminal, and not all can be encoded.
    return [
        f"{path}: has tensors with characters in their names that cannot be shown:"
        f" {some_names(map(repr, odd))}; rename them"
    ]


def _shared(tensors: Mapping[str, StoredTensor]) -> dict[str, str]:
    """A tensor -> the first one that has the same bytes of one file."""
    first: dict[object, str] = {}
    found: dict[str, str] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, FileTensor) and tensor.nbytes:
            owner = first.setdefault(
                (id(tensor.file), tensor.start, tensor.info.dtype, tensor.info.shape), name
            )
            if owner != name:
                found[name] = owner
    return found


def _homes(
    names: Mapping[Path, set[str]], opened: Sequence[tuple[Path, Sequence[StoredTensor]]]
) -> tuple[dict[str, Path], list[str]]:
    """The file of every name in an index, and notes: the one where it says, else the only one that
    holds it, as transformers reads them.
    """
    holders: dict[str, list[Path]] = {}
    for file, found in opened:
        for tensor in found:
            holders.setdefault(tensor.info.name, []).append(file)
    homes = {}
    moved: dict[tuple[Path, Path], list[str]] = {}
    for file, listed in names.items():
        for name in sorted(listed):
            held = holders.get(name, [])
            homes[name] = held[0] if len(held) == 1 and file not in held else file
            if homes[name] != file:
                moved.setdefault((file, homes[name]), []).append(name)
    notes = [
        f"{there}: holds {some_names(map(repr, found))}, which the index has in {file.name}; read"
        " from where it is"
        for (file, there), found in moved.items()
    ]
    return homes, notes


def _against_index(
    file: Path,
    held: Iterable[str],
    listed: set[str],
    homes: Mapping[str, Path],
    before: Collection[str],
) -> tuple[set[str], list[str], list[str]]:
    """(names of a shard to leave out, notes, problems).

    listed: the names that the index has in this shard. homes: the file of every name in the index.
        before: tensors of earlier files.

    A tensor that the index does not list is read too, as transformers does.
    """
    surplus = [name for name in held if name in homes and name not in listed]
    unlisted = [name for name in held if name not in homes]
    twice = [name for name in unlisted if name in before]
    absent = sorted(listed.difference(held))
    notes, problems = [], []
    if absent:
        problems.append(
            f"{file}: lacks tensors that the index says it holds: {some_names(map(repr, absent))}; "
            "download the file and its index again, or take these names out of the index where the"
            " model was saved without them"
        )
    if twice:
        problems.append(
            f"{file}: holds tensors that another shard holds too, and the index lists neither:"
            f" {some_names(map(repr, twice))}; download the shards and their index again"
        )
    if unlisted:
        are, they = ("is", "it is") if len(unlisted) == 1 else ("are", "they are")
        notes.append(
            f"{file}: tensor {some_names(map(repr, unlisted))} {are} not in the index; {they} read"
            " all the same"
        )
    if surplus:
        are, them = ("is", "it") if len(surplus) == 1 else ("are", "them")
        notes.append(
            f"{file}: tensor {some_names(map(repr, surplus))} {are} left out, since the index has"
            f" {them} in another file"
        )
    return set(surplus), notes, problems


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return read_json(path) if exists(path) else {}


def _files_of(folder: Path) -> tuple[list[Path], dict[Path, set[str]] | None]:
    """The files of a model folder, and the tensors that an index expects in each. The vectors of an
    (IA)^3 adapter are a model's tensors too.
    """
    for single, pickled in ((_SINGLE, False), (_PICKLED, True)):
        for name in single:
            if exists(folder / name):
                return [folder / name], None
            index = folder / f"{name}.index.json"
            if exists(index):
                return _indexed(folder, index)
        if not pickled:
            alone = sorted(folder.glob("*.safetensors"))
            if len(alone) == 1 and _is_a_model(alone[0]):
                return alone, None
    vectors = [folder / name for name in adapter_config.WEIGHTS if exists(folder / name)]
    if vectors and adapter_config.read_vector_config(folder) is not None:
        return vectors[:1], None
    raise CheckpointError(f"{folder}: {why_empty(folder, (*_SINGLE, *_PICKLED))}")


def _is_a_model(alone: Path) -> bool:
    """Whether the only safetensors file of a folder, under any name, counts as the model: no
    adapter, no shard of several, no companion of a PyTorch file.
    """
    if alone.name == "adapter_model.safetensors" or re.search(r"-\d+-of-\d+", alone.name):
        return False
    beside = (alone.with_name(name) for name in _PICKLED)
    return not any(
        exists(path) or exists(path.with_name(f"{path.name}.index.json")) for path in beside
    )


def _indexed(folder: Path, index: Path) -> tuple[list[Path], dict[Path, set[str]]]:
    weights = read_json(index, MAX_INDEX, unique=True).get("weight_map")
    if not isinstance(weights, dict) or not all(isinstance(v, str) for v in weights.values()):
        raise CheckpointError(
            f"{index}: has no weight_map of tensor names to file names; download it again"
        )
    if not weights:
        raise CheckpointError(f"{index}: lists no tensors; download it again")
    wrong: dict[str, list[str]] = {}  # what is wrong -> the shards of which it is true
    paths: dict[str, Path] = {}
    same: dict[tuple[int, int], Path] = {}  # a file may have several names: `x`, `./x`, a link
    for shard in sorted(set(weights.values())):
        path = folder / shard
        if not stays_inside(shard):
            wrong.setdefault("is outside its folder; do not trust it", []).append(shard)
        elif not exists(path):
            wrong.setdefault("is missing; download it too", []).append(shard)
        elif (reason := irregular(path)) is not None:
            wrong.setdefault(f"{reason}; download it", []).append(shard)
        else:
            status = path.stat()
            paths[shard] = same.setdefault((status.st_dev, status.st_ino), path)
    if wrong:
        raise CheckpointError([_wrong_shards(index, *each) for each in wrong.items()])
    names: dict[Path, set[str]] = {path: set() for path in paths.values()}
    for name, shard in weights.items():
        names[paths[shard]].add(name)
    return list(names), names


def _wrong_shards(index: Path, what: str, shards: Sequence[str]) -> str:
    named, which = ("shard", "which") if len(shards) == 1 else ("shards", "each of which")
    return f"{index}: names the {named} {some_names(map(repr, shards))}, {which} {what}"


def open_file(
    path: Path,
) -> tuple[InputFile, list[StoredTensor], Mapping[str, bytes], Sequence[str]]:
    """The file, its tensors, its metadata, and notes on what else it holds."""
    file = InputFile(path)
    if is_pointer(path):
        raise CheckpointError(
            f"{path}: is a pointer of Git LFS and not the file itself; fetch it with"
            " `git lfs pull`, or download the model with `hf download`"
        )
    if path.suffix == ".safetensors":
        metadata, entries = read_all(path)
        return file, [FileTensor(entry, file) for entry in entries], metadata, ()
    from pymerge.checkpoint.pickled import open_pickled

    tensors, notes = open_pickled(file)
    return file, tensors, {}, notes
