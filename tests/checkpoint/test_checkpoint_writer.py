"""Shards as transformers cuts them, written in order, hashed as they lie on the disk; folders that
appear whole.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import math
import multiprocessing
import resource
import signal
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from pymerge.checkpoint import writer as writer_module
from pymerge.checkpoint.folder import MANIFEST, OutputFolder
from pymerge.checkpoint.header import read_header
from pymerge.checkpoint.layout import (
    Shard,
    ShardSize,
    check_shard_size,
    index_json,
    lay_out,
    parse_shard_size,
    parse_size,
)
from pymerge.checkpoint.memory import Region
from pymerge.checkpoint.writer import BlockPool, ShardWriter, scratch
from pymerge.dtypes import elements, item_size, storage_bytes
from pymerge.errors import ConfigError, DiskFullError, OutputError
from pymerge.messages.words import shown


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return storage_bytes(self.dtype, self.shape)

    @property
    def elements(self) -> int:
        return elements(self.shape)


TENSORS = st.lists(
    st.builds(
        Tensor,
        name=st.text(min_size=1, max_size=6).filter(lambda n: n != "__metadata__"),
        shape=st.lists(st.integers(0, 9), max_size=3).map(tuple),
        dtype=st.sampled_from(["float32", "bfloat16", "float64", "uint8", "bool"]),
    ),
    min_size=1,
    max_size=12,
    unique_by=lambda t: t.name,
)


@settings(max_examples=200, deadline=None)
@given(tensors=TENSORS, size=st.integers(1, 5000))
def test_shards_are_transformers(tensors: list[Tensor], size: int) -> None:
    # The hub's function takes all empty tensors for views of one storage.
    tensors = [t for t in tensors if t.nbytes] or [Tensor("a", (1,), "uint8")]
    state = {t.name: torch.empty(t.shape, dtype=getattr(torch, t.dtype)) for t in tensors}
    split = split_torch_state_dict_into_shards(state, max_shard_size=size)
    shards = lay_out(tensors, ShardSize(size))
    ours = {s.file: sorted(tensors[i].name for i in s.tensors) for s in shards}
    theirs = {file: sorted(names) for file, names in split.filename_to_tensors.items()}
    assert ours == theirs


@settings(max_examples=100, deadline=None)
@given(tensors=TENSORS, size=st.integers(1, 5000))
def test_headers_are_good_and_aligned(
    tmp_path_factory: pytest.TempPathFactory, tensors: list[Tensor], size: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "laid_out.safetensors"
    for shard in lay_out(tensors, ShardSize(size)):
        path.write_bytes(shard.header + bytes(shard.nbytes - len(shard.header)))
        assert len(shard.header) % 64 == 0
        found = {e.info.name: e for e in read_header(path)}
        for index, offset in zip(shard.tensors, shard.offsets, strict=True):
            tensor = tensors[index]
            assert found[tensor.name].info.shape == tensor.shape
            assert found[tensor.name].info.dtype == tensor.dtype
            assert found[tensor.name].nbytes == tensor.nbytes
            if tensor.nbytes:
                assert found[tensor.name].start == offset
            assert offset % item_size(tensor.dtype) == 0


def test_index() -> None:
    tensors = [Tensor("b", (4,), "float32"), Tensor("a", (2, 2), "bfloat16")]
    index = json.loads(index_json(tensors, lay_out(tensors, ShardSize(16))))
    assert index == {
        "metadata": {"total_parameters": 8, "total_size": 24},
        "weight_map": {
            "a": "model-00002-of-00002.safetensors",
            "b": "model-00001-of-00002.safetensors",
        },
    }


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("1.5 kb", 1500),
        (" 2GiB", 2 << 30),
        (7, 7),
        ("12", 12),
        ("0.3KB", 300),
        ("9" * 400 + "TB", int("9" * 400) * 10**12),
    ],
)
def test_sizes_in_bytes(text: Any, size: int) -> None:
    assert parse_size(text) == size
    assert parse_shard_size(text) == ShardSize(size)


@pytest.mark.parametrize(
    ("text", "size"),
    [("5B", 5 * 10**9), ("500M", 5 * 10**8), ("100k", 10**5), ("1.5 b", 15 * 10**8)],
)
def test_sizes_in_parameters(text: str, size: int) -> None:
    assert parse_shard_size(text) == ShardSize(size, counts_parameters=True)
    with pytest.raises(ValueError, match=f"device_memory='{text}' is not a size; pass '5GB'"):
        parse_size(text, "device_memory")


@pytest.mark.parametrize(
    "text",
    ["", "five", "5 gigs", "5G", "-1GB", "0", "0B", "GB", "1e9", True, "9" * 5000, 10**5000],
    ids=lambda text: shown(text)[:10],
)
def test_bad_sizes(text: Any) -> None:
    with pytest.raises(ValueError, match=r"^out_shard_size=.{,600} is not a size; pass"):
        parse_shard_size(text, "out_shard_size")
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


def test_parameters_are_counted_whatever_their_dtype() -> None:
    tensors = [
        Tensor("a", (4,), "float32"),
        Tensor("b", (4,), "bfloat16"),
        Tensor("c", (2, 2), "float64"),
    ]
    files = [shard.tensors for shard in lay_out(tensors, ShardSize(8, counts_parameters=True))]
    assert files == [(0, 1), (2,)]
    assert len(lay_out(tensors, ShardSize(8))) == 3


def test_a_size_that_makes_a_file_of_nearly_every_tensor() -> None:
    tensors = [Tensor(str(i), (n,), "bfloat16") for i, n in enumerate([1000, 40, 40, 4])]
    check_shard_size(tensors, ShardSize(80), 80)  # one tensor is larger
    check_shard_size(tensors, ShardSize(40, counts_parameters=True), "40")
    check_shard_size(tensors[:1], ShardSize(1), 1)
    for size in (ShardSize(79), ShardSize(39, counts_parameters=True)):
        with pytest.raises(ConfigError, match=r"^out_shard_size='x' .* 3 of the 4 .*pass more"):
            check_shard_size(tensors, size, "x")


# The writer.


def write(path: Path, pieces: list[bytes], block: int = 64, header: bytes = b"head") -> str:
    pool = BlockPool(count=2, size=block)
    writer = ShardWriter(path, header, len(header) + sum(map(len, pieces)), pool)
    try:
        for piece in pieces:
            slot = writer.slot(len(piece))
            slot.view[:] = piece
            writer.done(slot, ("t", "uint8"))
        return writer.finish()
    except BaseException:
        writer.abort()
        raise
    finally:
        pool.close()


@settings(max_examples=60, deadline=None)
@given(pieces=st.lists(st.binary(max_size=200), max_size=30))
def test_what_is_written(tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes]) -> None:
    """Pieces of 64 bytes and less go through blocks, larger ones have memory of their own."""
    path = tmp_path_factory.getbasetemp() / "written"
    sha = write(path, pieces)
    assert path.read_bytes() == b"head" + b"".join(pieces)
    assert sha == hashlib.sha256(path.read_bytes()).hexdigest()


def test_values_that_are_not_finite_are_counted(tmp_path: Path) -> None:
    """Of each tensor alone, in blocks and in memory of their own, tensors in one slot or several."""
    inf, one = struct.pack("<e", math.inf), struct.pack("<e", 1.0)
    slots = [
        ("a", "float16", inf * 3 + one * 5),
        ("b", "float16", one * 4),
        ("c", "float16", (one + inf) * 100_000),
        ("d", "float16", one + inf),
        ("d", "float16", inf + one),
        ("e", "int16", inf * 8),
        ("f", "float32", struct.pack("<ff", math.nan, -math.inf)),
    ]
    pool = BlockPool(count=2, size=64)
    writer = ShardWriter(tmp_path / "f", b"", sum(len(content) for _, _, content in slots), pool)
    for name, dtype, content in slots:
        slot = writer.slot(len(content))
        slot.view[:] = content
        writer.done(slot, (name, dtype))
    writer.finish()
    pool.close()
    assert writer.non_finite == {"a": 3, "c": 100_000, "d": 2, "f": 2}


def test_large_slots_share_two_regions(tmp_path: Path) -> None:
    """However many there are; the second waits for no one, a third for the first."""
    made: list[Region] = []

    def large(nbytes: int) -> Region:
        made.append(Region.anonymous(nbytes))
        return made[-1]

    pieces = [bytes([k]) * 1000 for k in range(50)]
    pool = BlockPool(count=2, size=64, large=large)
    writer = ShardWriter(tmp_path / "f", b"head", 4 + 50_000, pool)
    for piece in pieces:
        slot = writer.slot(len(piece))
        slot.view[:] = piece
        writer.done(slot, ("t", "uint8"))
    assert writer.finish() == hashlib.sha256(b"head" + b"".join(pieces)).hexdigest()
    assert 1 <= len(made) <= 2
    pool.close()
    assert not any(region.address for region in made)


def test_large_slots_grow(tmp_path: Path) -> None:
    pieces = [bytes([k]) * (100 * k) for k in (1, 9, 3, 12, 2, 20, 5)]
    sha = write(tmp_path / "f", pieces)
    assert (tmp_path / "f").read_bytes() == b"head" + b"".join(pieces)
    assert sha == hashlib.sha256((tmp_path / "f").read_bytes()).hexdigest()


@pytest.mark.parametrize("at", ["slot", "write"])
def test_a_large_slot_that_fails_leaves_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """What is waiting to be written comes back, and so does a slot that was never done."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    made: list[Region] = []

    def large(nbytes: int) -> Region:
        if at == "slot" and made:
            refuse()
        made.append(Region.anonymous(nbytes))
        return made[-1]

    pool = BlockPool(count=2, size=64, large=large)
    writer = ShardWriter(tmp_path / "f", b"head", 4 + 1_000_000, pool)
    if at == "write":
        monkeypatch.setattr(writer_module, "_write", refuse)
    with pytest.raises((DiskFullError, OSError), match="No space left"):
        for k in range(1000):
            writer.done(writer.slot(100 + k), ("t", "uint8"))
    writer.abort()
    pool.close()
    assert not any(region.address for region in made)


@pytest.mark.parametrize("nbytes", [0, 1, 63, 64, 65, 1000])
def test_tensors_that_are_elsewhere(tmp_path: Path, nbytes: int) -> None:
    content = ctypes.create_string_buffer(bytes(k % 251 for k in range(nbytes)), max(1, nbytes))
    pool = BlockPool(count=2, size=64)
    writer = ShardWriter(tmp_path / "f", b"head", 4 + nbytes, pool)
    writer.put(ctypes.addressof(content), nbytes, ("t", "uint8"))
    writer.finish()
    pool.close()
    assert (tmp_path / "f").read_bytes() == b"head" + content.raw[:nbytes]


@pytest.mark.parametrize("mappings", [True, False])
def test_memory_of_a_file_without_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mappings: bool
) -> None:
    """Nobody can truncate it; where files cannot be mapped, it is memory without a file."""

    def refuse(*_: Any) -> Region:
        raise OSError(errno.ENODEV, "no such device")

    if not mappings:
        monkeypatch.setattr(Region, "of_file", refuse)
    region = scratch(tmp_path, 5000)
    assert list(tmp_path.iterdir()) == []
    region.view()[-3:] = b"end"
    assert bytes(region.view()) == bytes(4997) + b"end"
    region.close()


def test_without_allocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr("os.posix_fallocate", refuse)
    write(tmp_path / "f", [b"x" * 1000, b"y" * 3])
    assert (tmp_path / "f").read_bytes() == b"head" + b"x" * 1000 + b"yyy"


def test_full_disk_when_the_file_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", refuse)
    with pytest.raises(DiskFullError, match=r"f: no room left.*free some space"):
        ShardWriter(tmp_path / "f", b"head", 10, BlockPool())


def test_full_disk_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writing thread's error comes out where the writer is used, and nothing hangs."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    real = writer_module._write
    calls = []

    def some(fd: int, view: memoryview, position: int) -> None:
        calls.append(position)
        (refuse if len(calls) > 3 else real)(fd, view, position)

    monkeypatch.setattr(writer_module, "_write", some)
    with pytest.raises(DiskFullError, match="Disk quota exceeded"):
        write(tmp_path / "f", [b"x" * 60] * 50)


def limited(path: str, answer: Any) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        write(Path(path), [b"x" * 60] * 50)
    except DiskFullError as error:
        answer.put(str(error))


def test_real_limit_on_the_file_size(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    process = context.Process(target=limited, args=(str(tmp_path / "f"), answer))
    process.start()
    text = answer.get(timeout=600)
    assert "f: would be larger than this process may make a file" in text
    assert "out_shard_size" in text and "ulimit -f" in text and "free some space" not in text
    process.join()


def test_too_little_is_an_error(tmp_path: Path) -> None:
    pool = BlockPool()
    writer = ShardWriter(tmp_path / "f", b"head", 10, pool)
    with pytest.raises(OutputError, match="4 of 10 bytes"):
        writer.finish()
    pool.close()


# The folder.


def open_folder(out: Path, **options: Any) -> OutputFolder:
    folder = OutputFolder(out, (), overwrite=options.get("overwrite", False))
    folder.open()
    return folder


def test_nothing_under_the_name_until_published(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    folder = open_folder(out)
    folder.write_text("config.json", "{}")
    assert not out.exists()
    folder.publish()
    assert [p.name for p in out.iterdir()] == ["config.json"]
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    folder = open_folder(tmp_path / "out")
    folder.write_text("a", "b")
    folder.publish()
    assert (tmp_path / "out" / "a").read_text() == "b"


@pytest.mark.parametrize("exchange", [True, False])
def test_overwrite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr("pymerge.checkpoint.paths.exchange", lambda *_: False)
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    (out / "pytorch_model.bin").write_text("old")
    with pytest.raises(OutputError, match="not empty"):
        OutputFolder(out, (), overwrite=False)
    folder = open_folder(out, overwrite=True)
    folder.write_text("config.json", "new")
    assert (out / "config.json").read_text() == "old"
    folder.publish()
    assert {p.name: p.read_text() for p in out.iterdir()} == {"config.json": "new"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_is_not_overwritten(tmp_path: Path) -> None:
    precious = tmp_path / "photos"
    precious.mkdir()
    (precious / "cat.jpg").write_text("")
    with pytest.raises(OutputError, match="not a model folder"):
        OutputFolder(precious, (), overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="not a folder"):
        OutputFolder(tmp_path / "file", (), overwrite=True)


def test_output_and_inputs(tmp_path: Path) -> None:
    model = tmp_path / "models" / "a"
    model.mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to(model)
    for out in (model, link, tmp_path / "models", model / "out", tmp_path):
        with pytest.raises(OutputError, match="is, holds or lies in the input") as caught:
            OutputFolder(out, [model, model / "1.safetensors"], overwrite=True)
        assert len(caught.value.problems) == 1, "once for a folder, not again for each file in it"
    OutputFolder(tmp_path / "models" / "b", [model], overwrite=True)
    with pytest.raises(OutputError, match="root of the file system"):
        OutputFolder(Path("/"), (), overwrite=True)


def test_room_on_the_disk(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path / "not" / "yet" / "there", (), overwrite=False)
    folder.check_space(1000)
    with pytest.raises(DiskFullError, match=r"takes 1000000000.00 GB and .* GB free"):
        folder.check_space(10**18)


def test_two_at_once(tmp_path: Path) -> None:
    first = open_folder(tmp_path / "out")
    with pytest.raises(OutputError, match="another merge is writing"):
        open_folder(tmp_path / "out")
    first.discard()
    assert list(tmp_path.iterdir()) == []
    open_folder(tmp_path / "out").discard()


def test_leftovers_are_cleaned(tmp_path: Path) -> None:
    folder = open_folder(tmp_path / "out")
    folder.write_text("model.safetensors", "1")
    text = json.dumps({"copied": {"additional_chat_templates/b.jinja": "0" * 64}})
    folder.write_text(MANIFEST, text)
    folder.write_text("additional_chat_templates/b.jinja", "2")
    folder.close()
    folder = open_folder(tmp_path / "out")
    assert folder.manifest() == text.encode()
    folder.keep_only(["model.safetensors"])
    folder.publish()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_the_library_reads_it(tmp_path: Path) -> None:
    tensors = [
        Tensor("a", (3,), "float32"),
        Tensor("b", (2, 2), "float64"),
        Tensor("é", (), "bfloat16"),
    ]
    (shard,) = lay_out(tensors, ShardSize(10**9))
    assert isinstance(shard, Shard)
    values = {
        "a": torch.arange(3.0),
        "b": torch.ones(2, 2).double(),
        "é": torch.tensor(2.0).bfloat16(),
    }
    pieces = [
        bytes(values[tensors[i].name].reshape(-1).view(torch.uint8).tolist()) for i in shard.tensors
    ]
    path = tmp_path / shard.file
    write(path, pieces, header=shard.header)
    for name, value in load_file(path).items():
        assert torch.equal(value, values[name])
