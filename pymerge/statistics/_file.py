"""The statistics file: sums and counts in safetensors, read tensor by tensor (rules S10 to S13)."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, get_args

import torch

from pymerge.checkpoint import new_file, schemas
from pymerge.checkpoint.files import exists, irregular, is_folder
from pymerge.checkpoint.header import read_all
from pymerge.checkpoint.schemas import KINDS
from pymerge.checkpoint.stored import HeldFile
from pymerge.messages.arguments import argument, check_flags
from pymerge.messages.words import counted, some_names
from pymerge.rules import types

PACKED: tuple[types.PackedKind, ...] = get_args(types.PackedKind)
_BLOCK = 512

Header = dict[str, Any]


@dataclass(frozen=True)
class Counts:
    """What a sum ran over: unmasked positions, examples, and (example, drawn label) pairs."""

    tokens: int
    examples: int
    draws: int


class Statistics:
    """Statistics of one model on one set of data: a reader over sums and counts, in memory or in a
    file.

    Everything is asked for by the name of a layer ("encoder.layer.0.output.dense"; the name of its
    weight does too) or of a parameter, and comes as a new fp32 tensor on the CPU, or as None where
    nothing was collected (S12). With `mean=False` the sums themselves come.
    """

    def __init__(
        self, header: Header, read: Callable[[str], torch.Tensor], path: Path | None = None
    ) -> None:
        self.header = header
        self.path = path
        self._read = read

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Open a statistics file; only its header is read. ValueError where it is not one."""
        return load(path)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all of it to `path`, atomically: under that name there is the old file or the whole
        new one.

        FileExistsError where `path` exists and is not a statistics file.
        """
        check_free(Path(path), overwrite=True)
        tensors = ((key, self._read(key)) for key in self.header["tensors"])
        write(Path(path), self.header, tensors, overwrite=True)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the linear layers with a Gram matrix of either kind, aliases included."""
        names = dict.fromkeys(
            key.partition("/")[2]
            for key in self._keys()
            if key.startswith(("input_gram/", "output_grad_gram/"))
        )
        return tuple(names)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters with a diagonal or a block Fisher, tied names included."""
        names = dict.fromkeys(
            key.partition("/")[2]
            for key in self._keys()
            if key.startswith(("diagonal_fisher/", "block_fisher/"))
        )
        return tuple(names)

    def input_gram(self, layer: str, *, mean: bool = True) -> torch.Tensor | None:
        """(d_in, d_in): sum of x x^T over the layer's unmasked inputs, divided by the tokens (S3,
        S12).
        """
        return self._sum("input_gram", layer, "tokens", mean)

    def output_grad_gram(self, layer: str, *, mean: bool = True) -> torch.Tensor | None:
        """(d_out, d_out): sum of g g^T over the gradients of its outputs, divided by the draws (S4,
        S12).
        """
        return self._sum("output_grad_gram", layer, "draws", mean)

    def block_fisher(self, parameter: str, *, mean: bool = True) -> torch.Tensor | None:
        """(d, d): sum of v v^T over per-example gradients v of a vector parameter, divided by the
        draws (S6, S12).
        """
        return self._sum("block_fisher", parameter, "draws", mean)

    def diagonal_fisher(self, parameter: str, *, mean: bool = True) -> torch.Tensor | None:
        """The parameter's shape: sum of squared per-example gradients, divided by the draws (S5,
        S12).
        """
        return self._sum("diagonal_fisher", parameter, "draws", mean)

    def packed(self, kind: types.PackedKind, name: str) -> torch.Tensor | None:
        """A matrix kind's sum as stored: the upper triangle row by row, (d (d + 1) / 2,) fp32."""
        if kind not in PACKED:
            raise ValueError(
                f"kind={kind!r} is not stored as a triangle; pass one of {', '.join(PACKED)}"
            )
        key = self._find(kind, name)
        return None if key is None else self._read(key)

    def counts(self, name: str, kind: types.Kind | None = None) -> Counts:
        """What was summed for a layer or parameter: in one kind, or the most in any. Zeros for
        nothing.
        """
        found = [
            self._find(each, name, empty=True) for each in (KINDS if kind is None else (kind,))
        ]
        entries = [self.header["tensors"][key] for key in found if key is not None]
        tokens, examples, draws = (
            max((int(entry[unit]) for entry in entries), default=0)
            for unit in ("tokens", "examples", "draws")
        )
        return Counts(tokens, examples, draws)

    def shares_input(self, layer: str) -> str:
        """The layer under which `layer`'s input Gram is stored: itself, or the first that reads the
        same input.
        """
        key = self._find("input_gram", layer, empty=True)
        return layer if key is None else key.partition("/")[2]

    def __repr__(self) -> str:
        where = "in memory" if self.path is None else str(self.path)
        return (
            f"Statistics({counted(len(self.layers), 'layer')},"
            f" {counted(len(self.parameters), 'parameter')}, {where})"
        )

    def _keys(self) -> list[str]:
        return [*self.header["tensors"], *self.header["aliases"]]

    def _find(self, kind: str, name: str, empty: bool = False) -> str | None:
        """The key that holds `kind` of `name`; None where nothing was collected, or (unless
        `empty`) summed.
        """
        for candidate in (name, name.removesuffix(".weight")):
            key = resolve(self.header, f"{kind}/{candidate}")
            if key is not None:
                counts = self.header["tensors"][key]
                unit = "tokens" if kind in ("input_gram", "output_grad_gram") else "draws"
                return key if counts[unit] or empty else None
        return None

    def _sum(self, kind: str, name: str, unit: str, mean: bool) -> torch.Tensor | None:
        check_flags(mean=mean)
        key = self._find(kind, name)
        if key is None:
            return None
        held = self._read(key)
        total = unpack(held) if kind in PACKED else held
        return total / float(self.header["tensors"][key][unit]) if mean else total.clone()


def load(path: str | os.PathLike[str]) -> Statistics:
    """Open a statistics file; only its header is read. FileNotFoundError, or ValueError where it is
    not one.
    """
    file = Path(path)
    if not exists(file):
        raise FileNotFoundError(f"there is no statistics file {file}")
    reason = irregular(file)
    if reason is not None:
        raise ValueError(f"{file}: {reason}; name a file that `pymerge stats` wrote")
    held = HeldFile(file)
    metadata, entries = read_all(file)
    by_name = {entry.info.name: entry for entry in entries}
    infos = {name: entry.info for name, entry in by_name.items()}
    header = schemas.statistics(metadata, infos, file)

    def read(key: str) -> torch.Tensor:
        values = held.read(by_name[key].start, by_name[key].nbytes)
        if not values:
            return torch.empty(infos[key].shape, dtype=torch.float32, device="cpu")
        return torch.frombuffer(values, dtype=torch.float32).reshape(infos[key].shape)

    return Statistics(header, read, file)


def resolve(header: Header, key: str) -> str | None:
    """The key under which `key`'s sum is stored, through the aliases; None where there is none."""
    key = header["aliases"].get(key, key)
    return key if key in header["tensors"] else None


def merge_files(
    inputs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    allow_repeats: bool = False,
    allow_other_model: bool = False,
) -> Statistics:
    """Add statistics files of the same model: parts of the data, parts of the layers, or both
    (S11).

    The sums of a tensor that several files hold are added in fp64 and its counts as integers; a
    tensor that one file holds is taken over. Memory: one tensor and its sum. overwrite: replace the
    statistics file `out`. FileExistsError where `out` exists, and is not a statistics file or is
    not to be replaced. ValueError where the files come from other models or settings, or hold the
    same tensor of the same data twice.
    """
    check_flags(
        overwrite=overwrite, allow_repeats=allow_repeats, allow_other_model=allow_other_model
    )
    check_free(Path(out), overwrite=overwrite)
    return add_files(
        inputs,
        Path(out),
        overwrite=overwrite,
        allow_repeats=allow_repeats,
        allow_other_model=allow_other_model,
    )


def add_files(
    inputs: Sequence[str | os.PathLike[str]],
    out: Path,
    *,
    overwrite: bool,
    allow_repeats: bool = False,
    allow_other_model: bool = False,
) -> Statistics:
    """`merge_files`, where `out` was looked at before."""
    parts = [load(path) for path in inputs]
    if not parts:
        raise ValueError("inputs is empty; pass at least one statistics file")
    header = _merged_header(parts, allow_repeats, allow_other_model)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for key in header["tensors"]:
            found = [(part, resolve(part.header, key)) for part in parts]
            holders = [part._read(own) for part, own in found if own is not None]
            if len(holders) == 1:
                yield key, holders[0]
                continue
            total = holders[0].double()
            for other in holders[1:]:
                total += other
            yield key, total.float()

    write(out, header, tensors(), overwrite=overwrite)
    return load(out)


def _merged_header(parts: list[Statistics], allow_repeats: bool, allow_other_model: bool) -> Header:
    first = parts[0].header
    header = copy.deepcopy(first)
    header.pop("progress", None)
    header["tensors"], header["aliases"] = {}, {}
    for part in parts:
        own = part.header
        if own["model"]["fingerprint"] != first["model"]["fingerprint"] and not allow_other_model:
            raise ValueError(
                f"{part.path} was collected on another model than {parts[0].path} (their"
                " fingerprints differ); statistics of different models do not add"
            )
        for setting, value in own["settings"].items():
            if first["settings"].get(setting) != value:
                raise ValueError(
                    f"{part.path} has {setting}={value!r} where {parts[0].path} has "
                    f"{first['settings'].get(setting)!r}; collect both with the same settings"
                )
        for table in ("layers", "parameters", "skipped"):
            header[table].update(own[table])
        header["weights"] = {**header.get("weights", {}), **own.get("weights", {})}
    every = dict.fromkeys(key for part in parts for key in part._keys())
    added: dict[tuple[int, ...], list[Statistics]] = {(k,): [part] for k, part in enumerate(parts)}
    for key in every:
        holding = tuple(k for k, part in enumerate(parts) if resolve(part.header, key) is not None)
        holders = [parts[k] for k in holding]
        if not holders:  # an alias of a sum that is in none of these parts
            continue
        aliases = {part.header["aliases"].get(key) for part in holders}
        if len(aliases) == 1 and None not in aliases:
            header["aliases"][key] = aliases.pop()
            continue
        added[holding] = holders
        digests = [
            digest
            for part in holders
            for digest in {each["digest"] for each in part.header["data"] if each["examples"]}
        ]
        if len(digests) != len(set(digests)) and not allow_repeats:
            raise ValueError(
                f"{key} of the same data is in more than one of the files; leave the copies out, "
                f"or pass {argument('allow_repeats', True)} to count the data more than once"
            )
        total = {"tokens": 0, "examples": 0, "draws": 0}
        for part in holders:
            counts = part.header["tensors"][resolve(part.header, key)]
            total = {unit: total[unit] + counts[unit] for unit in total}
        header["tensors"][key] = total
        _check_shapes(header, key, holders)
    header["data"] = _data(list(added.values()))
    return header


def _data(added: Sequence[Sequence[Statistics]]) -> list[dict[str, Any]]:
    """The data of files of which `added` are summed: each entry as often as a sum has it, so that
    parts of the layers count their data once.
    """
    entries: list[dict[str, Any]] = []
    for parts in added:
        held = [entry for part in parts for entry in part.header["data"]]
        for entry in held:
            entries += [entry] * (held.count(entry) - entries.count(entry))
    return entries


def _check_shapes(header: Header, key: str, holders: list[Statistics]) -> None:
    """Files with one fingerprint can still be of different models: it is but a text in them."""
    name = key.partition("/")[2]
    known = name in header["layers"] or name in header["parameters"]
    shapes = {
        schemas.sum_shape(part.header, str(resolve(part.header, key))): part for part in holders
    }
    if known and list(shapes) == [schemas.sum_shape(header, key)]:
        return
    raise ValueError(
        f"{key} has different shapes, or none, in"
        f" {some_names(part.path for part in shapes.values())}; they are not of the same model:"
        " collect them again"
    )


def check_free(path: Path, *, overwrite: bool) -> None:
    """FileExistsError where `path` exists, unless it is a statistics file and is to be replaced;
    ValueError for a folder.
    """
    if is_folder(path):
        raise ValueError(f"{path} is a folder; pass the name of a file in it")
    if not os.path.lexists(path):
        return
    if path.exists() and not os.access(path, os.R_OK):
        raise FileExistsError(
            f"{path} exists and cannot be read, so that nobody knows what it holds; it is never"
            " replaced, give another name"
        )
    try:
        model = load(path).header["model"]
    except (OSError, ValueError, LookupError, TypeError):
        raise FileExistsError(
            f"{path} exists and is not a statistics file; it is never replaced, give another name"
        ) from None
    if not overwrite:
        raise FileExistsError(
            f"{path} exists and holds statistics of {model['name'] or model['class']}; give another"
            f" name, or pass {argument('overwrite', True)} to replace it"
        )


def writable(path: Path, *, overwrite: bool) -> Path:
    """`path`, under which a file can be written: known before the data are read, not after."""
    check_free(path, overwrite=overwrite)
    new_file.check_place(path)
    return path


def write(
    path: Path,
    header: Header,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    overwrite: bool = False,
) -> None:
    """Stream `tensors`, in the order of header["tensors"], into a new file that takes its name when
    complete (S13).

    FileExistsError where by then `check_free` finds another file there, which stays; the new one is
    kept beside it.
    """
    shapes = {key: schemas.sum_shape(header, key) for key in header["tensors"]}
    index: dict[str, Any] = {
        "__metadata__": {
            "format": schemas.STATISTICS_FORMAT,
            "version": schemas.STATISTICS_VERSION,
            "statistics": json.dumps(header, separators=(",", ":")),
        }
    }
    end = 0
    for key, shape in shapes.items():
        begin, end = end, end + 4 * torch.Size(shape).numel()
        index[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(index, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    new_file.check_place(path)
    with new_file.file_beside(path) as (temporary, file):
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for (key, tensor), expected in zip(tensors, shapes, strict=True):
            if key != expected or tuple(tensor.shape) != shapes[key]:
                raise RuntimeError(
                    f"tensor {key} {tuple(tensor.shape)} is not what the header announces"
                )
            _write_tensor(file, tensor)
        file.flush()
        os.fsync(file.fileno())
        why = "was written by another process meanwhile and is left as it is"
        try:
            check_free(path, overwrite=overwrite)
            _take_name(temporary, path, overwrite=overwrite)
            return
        except (FileExistsError, ValueError):
            pass
        except OSError as error:
            why = f"could not get that name ({error.strerror})"
        kept = path.with_name(temporary.name.removeprefix(".").removesuffix("part") + "new")
        _take_name(temporary, kept, overwrite=False)
    raise FileExistsError(f"{path} {why}; this result is {kept}")


def _take_name(temporary: Path, path: Path, *, overwrite: bool) -> None:
    """Give a file its name; FileExistsError where something has it that is not to be replaced."""
    if not overwrite:
        try:
            os.link(temporary, path)  # which replaces nothing, whatever appeared meanwhile
            return
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            if os.path.lexists(path):
                raise FileExistsError(f"{path} exists") from None
    temporary.replace(path)


def _write_tensor(file: BinaryIO, tensor: torch.Tensor) -> None:
    data = tensor.detach().to("cpu", torch.float32).contiguous().reshape(-1)
    file.write(data.numpy().data.cast("B"))


def pack(matrix: torch.Tensor) -> torch.Tensor:
    """The upper triangle of a (d, d) matrix, row by row, in fp32: (d (d + 1) / 2,)."""
    if matrix.shape[0] == 0:
        return torch.empty(0, dtype=torch.float32, device="cpu")
    rows = matrix.to(torch.float32)
    return torch.cat([row[i:] for i, row in enumerate(rows.unbind(0))])


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The symmetric (d, d) matrix whose upper triangle `pack` stored."""
    size = triangle_side(packed.numel())
    full = packed.new_empty(size, size)
    start = 0
    for i in range(size):
        full[i, i:] = packed[start : start + size - i]
        start += size - i
    for low in range(0, size, _BLOCK):
        high = min(low + _BLOCK, size)
        corner = full[low:high, low:high].triu()
        full[low:high, low:high] = corner + corner.triu(1).T
        full[high:, low:high] = full[low:high, high:].T
    return full


def triangle_side(numel: int) -> int:
    """d, given d (d + 1) / 2."""
    size = int(((8 * numel + 1) ** 0.5 - 1) / 2)
    for candidate in (size, size + 1):
        if candidate * (candidate + 1) // 2 == numel:
            return candidate
    raise ValueError(
        f"{numel} is no triangular number; a packed triangle has d (d + 1) / 2 elements"
    )


def in_memory(header: Header, tensors: Mapping[str, torch.Tensor]) -> Statistics:
    """Statistics over tensors at hand."""
    return Statistics(header, tensors.__getitem__)
