"""Modules with weights of their own (`2_Dense/` of an embedding model): taken from the model that
gives the config, since its list of modules names them, and not merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pymerge.checkpoint.files import exists, irregular
from pymerge.checkpoint.layout import ShardSize, lay_out
from pymerge.checkpoint.modules import MODULES, WEIGHTS, with_weights
from pymerge.checkpoint.reader import OpenModel, open_model
from pymerge.checkpoint.stored import StoredTensor
from pymerge.dtypes import elements
from pymerge.errors import CheckpointError, MergeError
from pymerge.messages.arguments import argument
from pymerge.messages.words import some_names

# Of all that are copied, which are in memory meanwhile. Most have 1 to 10 MB, large ones 50.
MOST_BYTES = 256 << 20


@dataclass
class Modules:
    """files: name -> content. folders: those whose weights are among the files. sources: what was
    read.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)
    sources: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def collect_modules(
    main: OpenModel,
    models: Sequence[OpenModel],
    *,
    strict: bool,
    most_bytes: int = MOST_BYTES,
) -> Modules:
    """The weights of the modules of `main`, as safetensors files. models: all that are merged; what
    they have otherwise is a note, or with `strict` a problem.
    """
    found = Modules()
    held = 0
    others = [each for each in models if each is not main and each.folder is not None]
    differences = []
    folders = with_weights(main.folder)
    for path in folders:
        try:
            own = _opened(main, path)
            held += sum(tensor.nbytes for tensor in own.tensors.values())
            if held > most_bytes:
                raise CheckpointError(
                    f"{main.folder}: the modules that its {MODULES} lists have more than"
                    f" {most_bytes} bytes of weights of their own ({some_names(folders)}); modules"
                    " of that size are not copied. Take them out of the list, merge, and add them"
                    " to the result"
                )
            found.files[f"{path}/{WEIGHTS[0]}"] = content = _written(own)
            found.sources += own.places
            found.folders.append(path)
            differences += [
                f"{path}/ of {other.reference}{said}"
                for other in others
                if (said := _otherwise(other, path, content))
            ]
        except MergeError as error:
            found.problems += error.problems
    surplus = {
        other.reference: [p for p in with_weights(other.folder) if p not in folders]
        for other in others
    }
    differences += [
        f"{'/, '.join(paths)}/ of {reference} {'is' if len(paths) == 1 else 'are'} left out, since"
        f" {main.reference} has none"
        for reference, paths in surplus.items()
        if paths
    ]
    if found.folders:
        are = "is" if len(found.folders) == 1 else "are"
        found.notes.append(
            f"the weights of {some_names(f'{path}/' for path in found.folders)} {are} copied from"
            f" {main.reference}, not merged"
        )
    if differences and strict:
        found.problems.append(
            f"modules with weights of their own are not merged: {'; '.join(differences)}; run"
            f" without {argument('strict', True)} to go on"
        )
    elif differences:
        found.notes.append(f"modules with weights of their own: {'; '.join(differences)}")
    return found


def _opened(model: OpenModel, path: str) -> OpenModel:
    """The file in which the weights of a module lie."""
    assert model.folder is not None
    files = [model.folder / path / name for name in WEIGHTS]
    file = next(filter(exists, files), files[0])
    why = irregular(file)
    if why is not None:
        raise CheckpointError(f"{file}: {why}; download it again")
    return open_model(str(file))


def _otherwise(model: OpenModel, path: str, content: bytes) -> str | None:
    """What is to be said where the same module of a model has other weights."""
    if path not in with_weights(model.folder):
        return " is not there"
    try:
        return None if _written(_opened(model, path)) == content else " has other weights"
    except MergeError as error:
        return f" cannot be read ({error.problems[0]})"


@dataclass(frozen=True)
class _Tensor:
    """As `lay_out` takes it."""

    stored: StoredTensor

    @property
    def name(self) -> str:
        return self.stored.info.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.info.shape

    @property
    def dtype(self) -> str:
        return self.stored.info.dtype

    @property
    def nbytes(self) -> int:
        return self.stored.nbytes

    @property
    def elements(self) -> int:
        return elements(self.shape)


def _written(model: OpenModel) -> bytes:
    """A model in one safetensors file: equal bytes for equal tensors."""
    try:
        tensors = [_Tensor(model.tensors[name]) for name in sorted(model.tensors)]
        (shard,) = lay_out(tensors, ShardSize(2**63))
        content = bytearray(shard.nbytes)
        content[: len(shard.header)] = shard.header
        for index, offset in zip(shard.tensors, shard.offsets, strict=True):
            end = offset + tensors[index].nbytes
            tensors[index].stored.read_into(0, memoryview(content)[offset:end])
        model.check()
        return bytes(content)
    finally:
        model.close()
