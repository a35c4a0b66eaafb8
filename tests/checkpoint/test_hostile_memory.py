"""Headers, indexes, tokenizers, configs and pickles of a few megabytes that ask for gigabytes, or
for ever.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from folder_cases import assert_same

from pymerge.checkpoint.header import Limits, read_header
from pymerge.checkpoint.pickled import load_pickled
from pymerge.checkpoint.pickles import check_pickled
from pymerge.checkpoint.reader import open_model
from pymerge.checkpoint.tokens import TokenReader
from pymerge.engine.merge import plan_checkpoints
from pymerge.errors import CheckpointError, MergeError

# Each is one that Python can take many times its own size for.

ENTRY = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
SHAPES: dict[str, Callable[[], str]] = {
    "entries": lambda: _object(f'"{i}":{ENTRY}' for i in range(540_000)),
    "lists": lambda: '{"a":[' + "[]," * 10_000_000 + "[]]}",
    "numbers": lambda: '{"a":[' + "1000," * 6_000_000 + "1]}",
    "objects": lambda: '{"a":[' + '{"a":1},' * 3_500_000 + "0]}",
    "names": lambda: _object(f'"{i}":0' for i in range(2_500_000)),
    "one name": lambda: '{"\U0001f600' + "a" * 30_000_000 + '":1}',
    "metadata": lambda: '{"__metadata__":' + _object(f'"{i}":""' for i in range(2_500_000)) + "}",
    "wide metadata": lambda: '{"__metadata__":{"a":"' + "a" * 94_000_000 + '\U0001f600"}}',
    "wide names": lambda: _object(f'"{i:05}{"a" * 4000}\U0001f600":{ENTRY}' for i in range(23_000)),
    "wide metadata names": lambda: (
        '{"__metadata__":'
        + _object(f'"{i:05}{"a" * 4000}\U0001f600":""' for i in range(23_000))
        + "}"
    ),
    "long shapes": lambda: _object(
        f'"{i}":{{"dtype":"U8","shape":[{"1," * 4000}0],"data_offsets":[0,0]}}'
        for i in range(11_000)
    ),
    "deep": lambda: "[" * 30_000_000,
    "deep objects": lambda: '{"a":' * 6_000_000,
    "digits": lambda: '{"a":' + "9" * 30_000_000 + "}",
    "blank": lambda: "{" + " " * 30_000_000 + "}",
    "colons": lambda: '{"a"' + ":1" * 15_000_000 + "}",
    "quotes": lambda: '{"' + '\\"' * 10_000_000 + '":1}',
}


def _object(entries: Iterable[str]) -> str:
    return "{" + ",".join(entries) + "}"


MEASURE = """
import resource, sys
from pathlib import Path
from pymerge.checkpoint.reader import open_model
from pymerge.checkpoint.reader import open_model
from pymerge.checkpoint.tokens import TokenReader
from pymerge.errors import CheckpointError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    {}
except CheckpointError as error:
    assert len(str(error)) < 5000
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""
CALLS = {
    "header": "open_model(sys.argv[1])",
    "index": "open_model(sys.argv[1])",
    "config": "open_model(sys.argv[1])",
    "tokenizer": "tokens = TokenReader().read(Path(sys.argv[1])); tokens.fits(9) or tokens.ids",
}


@pytest.mark.parametrize("line", ["ab", ""])
def test_a_vocabulary_of_too_many_lines(tmp_path: Path, line: str) -> None:
    (tmp_path / "vocab.txt").write_text(f"{line}\n" * ((1 << 22) + 1))
    tokens = TokenReader().read(tmp_path)
    assert tokens is not None
    with pytest.raises(CheckpointError, match=r"vocab.txt: has more than 4194304 lines"):
        tokens.fits(50)


@pytest.mark.slow
@pytest.mark.parametrize("place", CALLS)
@pytest.mark.parametrize("shape", SHAPES)
def test_memory_is_bounded(tmp_path: Path, place: str, shape: str) -> None:
    text = SHAPES[shape]().encode()
    if place == "header":
        path = tmp_path / "model.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text)
    else:
        name = {"index": "model.safetensors.index.json"}.get(place, f"{place}.json")
        (tmp_path / name).write_bytes(text)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE.format(CALLS[place]), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) <= 400, done.stdout


def test_a_header_of_too_many_tensors(tmp_path: Path) -> None:
    limits = Limits(tensors=1000)
    path = tmp_path / "m.safetensors"
    for count in (1000, 1001):
        text = _object(f'"{i}":{ENTRY}' for i in range(count))
        path.write_bytes(len(text).to_bytes(8, "little") + text.encode())
        if count == 1000:
            assert len(read_header(path, limits)) == count
        else:
            with pytest.raises(CheckpointError, match="more than 1000 tensors"):
                read_header(path, limits)


@pytest.mark.slow
def test_a_large_tokenizer_is_read(tmp_path: Path) -> None:
    vocab = {f"\u0120token{i}": i for i in range(250_000)}
    merges = [["\u0120to", f"ken{i}"] for i in range(400_000)]
    content = {"model": {"vocab": vocab, "merges": merges}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    tokens = TokenReader().read(tmp_path)
    assert tokens is not None and len(tokens.ids) == 250_000


# Pickles


def zipped(path: Path, pickled: bytes, how: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", how) as file:
        for name, content in (("data.pkl", pickled), ("data/0", b"\0" * 16), ("version", b"3\n")):
            file.writestr(f"a/{name}", content)
    return path


BOMBS = {
    "many objects": (b"\x80\x02" + b"]" * 30_000 + b".", "more than 20000 operations"),
    "bytearray": (b"\x80\x02c__builtin__\nbytearray\nI10000000000\n\x85R.", "bytearray"),
    "slow to hash": (
        b"\x80\x02}K\x01K\x01\x86q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"K\x05s.",
        "repeat",
    ),
    "slow to hash, hidden": (
        b"\x80\x02}K\x01K\x01\x86" + b"K\x010q\x00h\x00\x86" * 60 + b"K\x05s.",
        "repeat",
    ),
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("old", [True, False])
def test_pickles_that_ask_for_all_memory_or_time(tmp_path: Path, bomb: str, old: bool) -> None:
    pickled, message = BOMBS[bomb]
    path = tmp_path / "m.bin"
    if old:
        path.write_bytes(pickled)
    else:
        zipped(path, pickled)
    with pytest.raises(CheckpointError, match=message):
        check_pickled(path, most_operations=20_000)


def test_compressed_records(tmp_path: Path) -> None:
    """torch maps them as if they were not compressed, and gives garbage."""
    torch.save({"a": torch.ones(4)}, tmp_path / "m.bin")
    with (
        zipfile.ZipFile(tmp_path / "m.bin") as file,
        zipfile.ZipFile(tmp_path / "c.bin", "w", 8) as to,
    ):
        for name in file.namelist():
            to.writestr(name, file.read(name))
    with pytest.raises(CheckpointError, match="compressed records"):
        load_pickled(tmp_path / "c.bin")


@pytest.mark.parametrize(
    "change",
    [lambda content: content[:-4], lambda content: content + b"1234", lambda content: b""],
    ids=["shorter", "longer", "empty"],
)
@pytest.mark.parametrize("strided", [False, True])
def test_records_of_other_lengths(
    tmp_path: Path, change: Callable[[bytes], bytes], strided: bool
) -> None:
    """torch maps as much as the pickle says, the bytes of the next record too."""
    whole = torch.arange(12.0).reshape(3, 4)
    torch.save({"a": whole.t() if strided else whole, "b": torch.ones(9)}, tmp_path / "m.bin")
    with (
        zipfile.ZipFile(tmp_path / "m.bin") as file,
        zipfile.ZipFile(tmp_path / "c.bin", "w") as to,
    ):
        for name in file.namelist():
            content = file.read(name)
            to.writestr(name, change(content) if name.endswith("data/0") else content)
    with pytest.raises(CheckpointError, match=r"damaged"):
        open_model(str(tmp_path / "c.bin"))
    open_model(str(tmp_path / "m.bin")).close()


@pytest.mark.parametrize("old", [True, False])
def test_what_torch_saves_is_read(tmp_path: Path, old: bool) -> None:
    state = {f"layer.{i}.weight": torch.randn(3, 2) for i in range(50)}
    state["tied"] = state["layer.0.weight"]
    state["repeated"] = torch.ones(1).expand(3, 1000)
    torch.save(state, tmp_path / "m.bin", _use_new_zipfile_serialization=not old)
    assert_same(load_pickled(tmp_path / "m.bin")[0], state)
    torch.save({"a": torch.ones(1).expand(10**6, 10**6)}, tmp_path / "m.bin")
    with pytest.raises(CheckpointError, match=r"'a' of .* repeats"):
        load_pickled(tmp_path / "m.bin")


def test_where_no_system_tells_what_is_mapped_nothing_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pymerge.checkpoint.pickled._MAPS", tmp_path / "none")
    state = {"a": torch.randn(3000), "b": torch.randn(2, 3)}
    torch.save(state, tmp_path / "m.bin")
    loaded, _ = load_pickled(tmp_path / "m.bin")
    (tmp_path / "m.bin").write_bytes(b"")
    assert_same(loaded, state)


def test_yaml_of_aliases(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    (tmp_path / "r.yml").write_text("\n".join(lines))
    with pytest.raises(MergeError, match="aliases expanded"):
        plan_checkpoints(tmp_path / "r.yml")
