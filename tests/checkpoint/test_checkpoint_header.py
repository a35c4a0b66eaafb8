"""The safetensors header reader takes what the library takes, less what is ambiguous, and refuses
the rest by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from pymerge.checkpoint.header import Limits, read_all, read_header
from pymerge.dtypes import CODES
from pymerge.errors import CheckpointError

ESCAPES = (b"\\\\", b"\\ud83d", b"\\ude00", b"\\u00e9", b"\\n", b"\\", b"a", b"\xf0\x9f\x98\x80")
FUZZ = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(
    begin: int, end: int, shape: list[Any] | None = None, dtype: Any = "U8"
) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": [end - begin] if shape is None else shape,
        "data_offsets": [begin, end],
    }


BAD = {
    "empty": (b"", "0 bytes long"),
    "seven bytes": (b"1234567", "7 bytes long"),
    "garbage": (b"\x93NUMPY\x01\x00v\x00{'descr'", "at most|most that is allowed"),
    "huge length": (raw({}, length=1 << 62), "most that is allowed"),
    "length beyond the file": (raw({}, length=1000), "truncated"),
    "not json": (raw(b"{nope"), "not JSON"),
    "not utf-8": (raw(b'{"\xff": 1}'), "not JSON"),
    "deep json": (raw(b'{"a":' * 100_000), "not JSON"),
    "long number": (raw(b'{"a": ' + b"9" * 5000 + b"}"), "not JSON"),
    "a list": (raw([]), "not a JSON object"),
    "twice": (raw(b'{"a": 1, "a": 2}'), "twice.*a"),
    "metadata": (raw({"__metadata__": {"format": 1}}), "__metadata__"),
    "no dtype": (raw({"a": {"shape": [], "data_offsets": [0, 0]}}), "'a' does not have"),
    "extra key": (raw({"a": {**entry(0, 1), "x": 1}}, b"1"), "'a' does not have"),
    "a number": (raw({"a": 5}), "'a' does not have"),
    "unknown dtype": (raw({"a": entry(0, 1, dtype="F17")}, b"1"), "unknown dtype 'F17'"),
    "dtype list": (raw({"a": entry(0, 1, dtype=["U8"])}, b"1"), "unknown dtype"),
    "negative shape": (raw({"a": entry(0, 1, shape=[-1])}, b"1"), "shape"),
    "float shape": (raw({"a": entry(0, 1, shape=[1.0])}, b"1"), "shape"),
    "bool shape": (raw({"a": entry(0, 1, shape=[True])}, b"1"), "shape"),
    "shape overflow": (
        raw({"a": entry(0, 1, shape=[1 << 62, 1 << 62])}, b"1"),
        "more elements than",
    ),
    "empty overflow": (raw({"a": entry(0, 0, shape=[1 << 62, 1 << 62, 0])}), "more elements than"),
    "half a pair": (
        raw(b'{"\\ud800": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}'),
        "not JSON",
    ),
    "leading blank": (raw(b" {}"), "not a JSON object"),
    "negative offset": (raw({"a": entry(-1, 0)}, b"1"), "data_offsets"),
    "reversed": (raw({"a": entry(1, 0)}, b"1"), "shape"),
    "three offsets": (raw({"a": {**entry(0, 1), "data_offsets": [0, 1, 2]}}, b"1"), "data_offsets"),
    "size and shape": (raw({"a": entry(0, 4, shape=[3])}, b"1234"), "takes 3 bytes"),
    "out of range": (raw({"a": entry(0, 9)}, b"1234"), "'a' ends at byte"),
    "far out of range": (raw({"a": entry(1 << 40, (1 << 40) + 1)}, b"1"), "'a' ends at byte"),
    "overlap": (raw({"a": entry(0, 3), "b": entry(2, 4)}, b"1234"), "'b' overlaps"),
    "same bytes": (raw({"a": entry(0, 4), "b": entry(0, 4)}, b"1234"), "overlaps"),
    "hole": (
        raw({"a": entry(0, 1), "b": entry(3, 4)}, b"1234"),
        "hole of 2 bytes before tensor 'b'",
    ),
    "hole in front": (raw({"a": entry(1, 4)}, b"1234"), "hole of 1 bytes before tensor 'a'"),
    "trailing": (raw({"a": entry(0, 2)}, b"1234"), "2 bytes after"),
    "half a byte": (raw({"a": entry(0, 1, shape=[1], dtype="F4")}, b"1"), "whole bytes"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_header_is_named(tmp_path: Path, case: str) -> None:
    content, message = BAD[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


def test_every_problem_is_listed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw({"a": entry(0, 1, dtype="F17"), "b": entry(0, 2, shape=[7])}, b"1234"))
    with pytest.raises(CheckpointError, match=r"(?s)'a'.*F17.*'b'"):
        read_header(path)


def test_a_truncated_file_names_a_few_of_its_tensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({f"layer.{i:02}.weight": torch.ones(100) for i in range(40)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 4])
    with pytest.raises(CheckpointError, match=r"and \d\d others end beyond byte") as caught:
        read_header(path)
    assert str(caught.value).count("layer.") == 4
    path.write_bytes(raw({f"t{i}": entry(0, 1, dtype="F17") for i in range(30)}, b"1"))
    with pytest.raises(CheckpointError, match="and 26 more"):
        read_header(path)


@FUZZ
@given(
    text=st.text(st.sampled_from('a"\\\x00\n\xe9\u20ac\U0001f600'), max_size=80),
    ascii=st.booleans(),
)
def test_free_text_is_read_in_pieces(tmp_path: Path, text: str, ascii: bool) -> None:
    """Whatever character or escape a piece would end in."""
    path = tmp_path / "m.safetensors"
    written = json.dumps({"__metadata__": {"a": text}}, ensure_ascii=ascii).encode()
    path.write_bytes(raw(written))
    assert read_all(path, Limits(piece=16)) == ({"a": text.encode()}, [])


@FUZZ
@given(text=st.binary(max_size=60), escaped=st.lists(st.sampled_from(ESCAPES), max_size=12))
def test_bad_free_text_is_found_in_pieces(
    tmp_path: Path, text: bytes, escaped: list[bytes]
) -> None:
    path = tmp_path / "m.safetensors"
    for content in (text, b"".join(escaped), text + b"".join(escaped)):
        path.write_bytes(raw(b'{"__metadata__":{"a":"' + content + b'"}}'))
        found = []
        for piece in (16, 1 << 16):
            try:
                found.append(read_all(path, Limits(piece=piece))[0])
            except CheckpointError:
                found.append({})
        assert found[0] == found[1]


@pytest.mark.parametrize("what", ["names", "metadata", "shapes"])
def test_names_that_take_too_much_memory(tmp_path: Path, what: str) -> None:
    names = [f"{i}{'a' * 400}\U0001f600" for i in range(100)]
    content: dict[str, Any] = {name: entry(0, 0) for name in names}
    if what == "metadata":
        content = {"__metadata__": dict.fromkeys(names, "")}
    if what == "shapes":
        content = {f"t{i}": entry(0, 0, shape=[1] * 1000 + [0]) for i in range(20)}
    path = tmp_path / "m.safetensors"
    path.write_bytes(raw(content))
    with pytest.raises(CheckpointError, match="names and shapes take more than 100000 bytes"):
        read_header(path, Limits(names=100_000))
    read_header(path, Limits(names=1_000_000))


def test_every_truncation_is_found(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(5), "b": torch.ones(2, 3)}, path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            read_header(path)


def test_not_a_regular_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_header(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be opened"):
        read_header(tmp_path / "absent")


def test_where_the_bytes_are(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    state = {
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(3.5, dtype=torch.bfloat16),
        "matrix": torch.randn(3, 5),
        "flags": torch.tensor([True, False]),
        "wide": torch.randn(2, dtype=torch.float64),
        "small": torch.randn(7).to(torch.float8_e4m3fn),
    }
    save_file(state, path)
    whole = path.read_bytes()
    found = {e.info.name: e for e in read_header(path)}
    assert sorted(found) == sorted(state)
    for name, tensor in state.items():
        at = found[name]
        assert at.info.shape == tuple(tensor.shape)
        assert f"torch.{at.info.dtype}" == str(tensor.dtype)
        bits = (
            tensor.reshape(-1).view(torch.uint8)
            if tensor.numel()
            else torch.empty(0, dtype=torch.uint8)
        )
        assert whole[at.start : at.start + at.nbytes] == bytes(bits.tolist())


def test_every_code_is_torchs() -> None:
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    since = {"float8_e8m0fnu": (2, 7), "float4_e2m1fn_x2": (2, 8)}
    for name, _ in CODES.values():
        if not name.startswith("float6"):  # torch has no such type
            assert hasattr(torch, name) == (version >= since.get(name, (2, 6)))


def library_takes(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
        return True
    except Exception:
        return False


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
SIZES = st.integers(-1, 5)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*CODES, "F17", ""]),
        "shape": st.lists(SIZES, max_size=2),
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2),
    }
)


def check(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        entries = read_header(path)
    except CheckpointError:
        return
    assert library_takes(path)
    with safe_open(path, framework="numpy") as file:
        assert sorted(file.keys()) == sorted(e.info.name for e in entries)
        for e in entries:
            assert file.get_slice(e.info.name).get_shape() == list(e.info.shape)
    assert all(0 <= e.start and e.start + e.nbytes <= len(content) for e in entries)


@FUZZ
@given(content=st.binary(max_size=64))
def test_fuzz_bytes(tmp_path: Path, content: bytes) -> None:
    check(tmp_path / "f.safetensors", content)


@FUZZ
@given(header=JSON, data=st.binary(max_size=8))
def test_fuzz_json(tmp_path: Path, header: Any, data: bytes) -> None:
    check(tmp_path / "f.safetensors", raw(header, data))


@FUZZ
@given(
    header=st.dictionaries(st.text(max_size=4), ENTRY | JSON, max_size=4), size=st.integers(0, 40)
)
def test_fuzz_entries(tmp_path: Path, header: dict[str, Any], size: int) -> None:
    check(tmp_path / "f.safetensors", raw(header, bytes(size)))


@FUZZ
@given(
    sizes=st.lists(st.integers(0, 4), max_size=5),
    swap=st.integers(0, 200),
    byte=st.integers(0, 255),
    extra=st.integers(-3, 3),
)
def test_fuzz_nearly_good(
    tmp_path: Path, sizes: list[int], swap: int, byte: int, extra: int
) -> None:
    """A good file with one byte changed, or a few cut off or added."""
    header = {}
    position = 0
    for number, size in enumerate(sizes):
        header[f"t{number}"] = entry(position, position + 2 * size, [size], "BF16")
        position += 2 * size
    content = bytearray(raw(header, bytes(max(0, position + extra))))
    content[swap % len(content)] = byte
    check(tmp_path / "f.safetensors", bytes(content))
