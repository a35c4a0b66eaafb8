"""Folders of torch.distributed.checkpoint as models: what is read from them, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from distributed_checkpoints import full_state
from folder_cases import CONFIG, State, family, write_model
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata

from pymerge.checkpoint.boxes import Box, BoxedTensor, why_not_whole
from pymerge.checkpoint.reader import OpenModel, open_model
from pymerge.checkpoint.stored import FileTensor, InputFile, StoredTensor
from pymerge.checkpoint.types import TensorInfo
from pymerge.dtypes import name_of
from pymerge.engine.merge import merge_checkpoints
from pymerge.errors import CheckpointError

SCRIPT = Path(__file__).parents[1] / "distributed_checkpoints.py"


def save(folder: Path, state: dict[str, Any]) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        dcp.save(state, checkpoint_id=folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """One token for every row of the embedding."""
    vocabulary = {f"t{number}": number for number in range(37)}
    text = json.dumps({"model": {"type": "WordLevel", "vocab": vocabulary}})
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")


def content(stored: StoredTensor) -> bytes:
    held = bytearray(stored.nbytes)
    stored.read_into(0, memoryview(held))
    return bytes(held)


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_holds(model: OpenModel, state: State) -> None:
    assert model.tensors.keys() == state.keys()
    for name, tensor in state.items():
        stored = model.tensors[name]
        assert (stored.info.shape, stored.info.dtype) == (tensor.shape, name_of(tensor.dtype))
        assert content(stored) == as_bytes(tensor), name


KINDS = {
    "x.weight": torch.randn(3, 4),
    "x.half": torch.randn(3).half(),
    "x.brain": torch.randn(5, 2).bfloat16(),
    "double": torch.randn(2).double(),
    "count": torch.tensor(7),
    "mask": torch.tensor([True, False]),
    "fp8": torch.randn(4, 4).to(torch.float8_e4m3fn),
    "words": torch.arange(5).to(torch.uint16),
    "empty": torch.zeros(0, 3),
    "turned": torch.randn(6, 5).t(),
    "image": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
}


def test_tensors_of_every_kind(tmp_path: Path) -> None:
    """Those in another order in memory are saved with their strides."""
    model = open_model(str(save(tmp_path / "m", KINDS)))
    assert_holds(model, KINDS)
    assert model.notes == ()
    assert isinstance(model.tensors["x.weight"], FileTensor)  # used in place


ADAM = {"state": {"w": {"exp_avg": torch.ones(2, 2), "step": torch.tensor(3.0)}}}


@pytest.mark.parametrize(
    ("saved", "note"),
    [
        (
            {"model": KINDS, "optimizer": ADAM, "step": 3},
            "'model' (11 tensors); 'optimizer' (2 tensors) beside it is left out",
        ),
        ({"app": {"model": KINDS, "optim": ADAM}}, "'app.model' (11 tensors); 'app.optim' (2"),
        ({**KINDS, "optimizer": ADAM}, "lies at its top (11 tensors); 'optimizer' (2"),
        ({"state_dict": KINDS, "loops": {"epoch": 1}}, "'state_dict' (11 tensors)"),
    ],
)
def test_the_model_is_found_beside_the_optimizer(
    tmp_path: Path, saved: dict[str, Any], note: str
) -> None:
    model = open_model(str(save(tmp_path / "m", saved)))
    assert_holds(model, KINDS)
    assert len(model.notes) == 1
    assert note in model.notes[0]


def test_without_what_the_planner_says(tmp_path: Path) -> None:
    """Other programs' planners keep other data; names with an optimizer in them are left out."""
    folder = save(tmp_path / "m", {"model": {"w": torch.ones(2)}, "optimizer": ADAM})

    def forget(metadata: Metadata) -> None:
        metadata.planner_data = object()

    rewrite(folder, forget)
    model = open_model(str(folder))
    assert list(model.tensors) == ["model.w"]
    assert "'optimizer' (2 tensors)" in model.notes[0]


def test_what_accelerate_and_transformers_write(tmp_path: Path) -> None:
    """The model's part in a folder of its own, beside small files and the optimizer's part."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    save(tmp_path / "pytorch_model_fsdp_0", {"model": KINDS})
    save(tmp_path / "optimizer_0", {"optimizer": ADAM})
    model = open_model(str(tmp_path))
    assert_holds(model, KINDS)
    assert model.header.config == {"model_type": "llama"}


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints that two processes saved together."""
    folder = tmp_path_factory.mktemp("by_two")
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(folder)],
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)
    return folder


@pytest.mark.parametrize("kind", ["fsdp", "columns", "safetensors"])
def test_parts_of_two_processes(by_two: Path, kind: str) -> None:
    model = open_model(str(by_two / kind))
    assert_holds(model, full_state())
    cut = [name for name, each in model.tensors.items() if isinstance(each, BoxedTensor)]
    assert len(cut) >= 4, "nothing is cut"
    assert ("'app.model'" in str(model.notes)) == (kind == "fsdp")


def test_a_missing_file_of_two(by_two: Path, tmp_path: Path) -> None:
    for name in (".metadata", "__0_0.distcp"):
        (tmp_path / name).write_bytes((by_two / "fsdp" / name).read_bytes())
    with pytest.raises(CheckpointError, match=r"names '__1_0\.distcp', which is missing; copy it"):
        open_model(str(tmp_path))
    first = "shard-00001-model-00001-of-00001.safetensors"
    (tmp_path / ".metadata").unlink()
    (tmp_path / first.replace("00001-m", "00002-m")).write_bytes(
        (by_two / "safetensors" / first.replace("00001-m", "00002-m")).read_bytes()
    )
    with pytest.raises(CheckpointError, match=r"'up\.weight' lacks \d+ of its 66 elements"):
        open_model(str(tmp_path))


def test_merged_as_if_they_were_one_file(by_two: Path, tmp_path: Path) -> None:
    """To the bit, by a method that reads in order and one that needs whole tensors' thresholds."""
    one = write_model(tmp_path / "one", full_state())
    other = write_model(tmp_path / "other", {n: -2 * t for n, t in full_state().items()})
    for method, parameters in (
        ("linear", {"weight": 0.4}),
        ("ties", {"weight": 1, "density": 0.3}),
    ):
        merged = []
        for model in (one, by_two / "columns", by_two / "fsdp"):
            recipe = {
                "merge_method": method,
                "base_model": str(other),
                "models": [{"model": str(m), "parameters": parameters} for m in (model, other)],
                "dtype": "bfloat16",
            }
            out = tmp_path / "out"
            merge_checkpoints(recipe, out, overwrite=True)
            merged.append((out / "model.safetensors").read_bytes())
        assert merged[0] == merged[1] == merged[2]


def test_the_last_checkpoints_of_a_run(tmp_path: Path) -> None:
    """Averaged with decaying weights, and a config and tokenizer files from the model that was
    trained.
    """
    states = family(3, torch.float32)
    write_model(tmp_path / "trained", states[0])
    write_tokenizer(tmp_path / "trained")
    (tmp_path / "trained" / "generation_config.json").write_text("{}", encoding="utf-8")
    models = []
    for step, state in enumerate(states[1:]):
        folder = save(tmp_path / f"step-{step}", {"model": state, "optim": ADAM})
        models.append({"model": str(folder), "parameters": {"weight": 0.5 ** (2 - step)}})
    recipe: dict[str, Any] = {"merge_method": "linear", "models": models}
    plain = merge_checkpoints(recipe, tmp_path / "plain")
    assert any("has no config.json, so the result gets none" in note for note in plain.notes)
    recipe |= {"tokenizer_source": str(tmp_path / "trained"), "dtype": "float32"}
    summary = merge_checkpoints(recipe, tmp_path / "out")
    assert any("has no config.json; that of" in note for note in summary.notes)
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= made
    total = sum(0.5 ** (2 - k) for k in range(3))
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        mean = sum(0.5 ** (2 - k) / total * states[1 + k][name].double() for k in range(3))
        torch.testing.assert_close(tensor.double(), mean, rtol=1e-6, atol=1e-6)


def test_a_checkpoint_with_its_own_config_keeps_it(tmp_path: Path) -> None:
    state = family(0, torch.float32)[0]
    write_model(tmp_path / "trained", state, {**CONFIG, "eos_token_id": 3})
    write_tokenizer(tmp_path / "trained")
    folder = save(tmp_path / "step", state)
    (folder / "config.json").write_text('{"model_type": "own"}', encoding="utf-8")
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(folder), "parameters": {"weight": 1}}],
        "tokenizer_source": str(tmp_path / "trained"),
    }
    merge_checkpoints(recipe, tmp_path / "out")
    assert '"own"' in (tmp_path / "out" / "config.json").read_text(encoding="utf-8")


def rewrite(folder: Path, change: Callable[[Metadata], None]) -> None:
    """Change what the metadata says."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def _place(metadata: Metadata) -> Any:
    return next(iter(metadata.storage_data.values()))


def _elsewhere(metadata: Metadata) -> None:
    _place(metadata).relative_path = "../secret"


def _behind(metadata: Metadata) -> None:
    _place(metadata).length += 10_000


def _within(metadata: Metadata) -> None:
    _place(metadata).offset, _place(metadata).length = 1, _place(metadata).length - 1


def _negative(metadata: Metadata) -> None:
    _place(metadata).offset = -1


def _compressed(metadata: Metadata) -> None:
    _place(metadata).transform_descriptors = ["zstd"]


def _no_place(metadata: Metadata) -> None:
    metadata.storage_data.clear()


def _larger(metadata: Metadata) -> None:
    metadata.state_dict_metadata["w"].size = torch.Size((9, 4))


def _smaller(metadata: Metadata) -> None:
    metadata.state_dict_metadata["w"].size = torch.Size((2, 4))


def _turned(metadata: Metadata) -> None:
    metadata.state_dict_metadata["w"].size = torch.Size((4, 3))
    metadata.state_dict_metadata["w"].chunks[0].sizes = torch.Size((4, 3))


def _twice(metadata: Metadata) -> None:
    metadata.state_dict_metadata["w"].chunks *= 2


def _huge(metadata: Metadata) -> None:
    chunk = ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((2**62, 4)))
    metadata.state_dict_metadata["w"].size = torch.Size((2**62, 4))
    metadata.state_dict_metadata["w"].chunks = [chunk]


def _other_dtype(metadata: Metadata) -> None:
    metadata.state_dict_metadata["w"].properties.dtype = torch.int32


def _unknown_dtype(metadata: Metadata) -> None:
    metadata.state_dict_metadata["w"].properties.dtype = torch.qint8


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_elsewhere, r"names '\.\./secret', which is outside its folder; do not trust it"),
        (_behind, r"'w' has a part that ends behind the end of __0_0\.distcp"),
        (_within, r"'w' has a part in __0_0\.distcp that is damaged"),
        (_negative, r"'w' has a part at no place of its file"),
        (_compressed, r"'w' was saved with transforms .*zstd.*save it without"),
        (_no_place, r"'w' has parts of which \.metadata gives no file"),
        (_larger, r"'w' lacks 24 of its 36 elements; copy all files"),
        (_smaller, r"\.metadata: is damaged"),
        (_turned, r"is float32 of \[3, 4\], and by \.metadata float32 of \[4, 3\]"),
        (_twice, r"'w' has parts that overlap"),
        (_huge, r"\.metadata: is damaged"),
        (_other_dtype, r"is float32 of \[3, 4\], and by \.metadata int32 of"),
        (_unknown_dtype, r"'w' is of no known dtype; convert it"),
    ],
)
def test_metadata_that_does_not_fit(
    tmp_path: Path, change: Callable[[Metadata], None], said: str
) -> None:
    folder = save(tmp_path / "m", {"w": torch.randn(3, 4)})
    (tmp_path / "secret").write_bytes((folder / "__0_0.distcp").read_bytes())
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=said):
        open_model(str(folder))


class Touch:
    """Unpickled by anything that obeys it, this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_no_code_of_a_folder_runs(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", {"w": torch.ones(3)})
    made = tmp_path / "made"

    def plant(metadata: Metadata) -> None:
        metadata.planner_data = [Touch(made), {1: Touch(made)}]
        metadata.storage_meta = Touch(made)  # type: ignore[assignment]

    rewrite(folder, plant)
    assert content(open_model(str(folder)).tensors["w"]) == as_bytes(torch.ones(3))
    assert not made.exists()
    (folder / ".metadata").write_bytes(pickle.dumps(Touch(made)))
    with pytest.raises(CheckpointError, match=r"\.metadata: is damaged, or not what torch"):
        open_model(str(folder))
    assert not made.exists()


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"x" * 40,
        b"\x80\x04}.",
        b"\x80\x04" + b"}" * 1000 + b".",
        b"\x80\x04\x95" + b"\xff" * 9,
    ],
)
def test_no_metadata_at_all(tmp_path: Path, bad: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(bad)
    with pytest.raises(CheckpointError, match="is damaged"):
        open_model(str(tmp_path))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (lambda t: t.to_sparse(), "is not a plain tensor"),
        (lambda t: torch.complex(t, t).conj(), "is conjugated or negated lazily"),
        (lambda t: t[:, :2], "is a view with gaps"),
    ],
)
def test_parts_that_are_no_plain_tensors(
    tmp_path: Path, kind: Callable[[torch.Tensor], torch.Tensor], said: str
) -> None:
    """As other writers of the format may leave them."""
    folder = save(tmp_path / "m", {"w": torch.randn(3, 4)})
    torch.save(kind(torch.randn(3, 4)), folder / "__0_0.distcp")

    def refit(metadata: Metadata) -> None:
        _place(metadata).length = (folder / "__0_0.distcp").stat().st_size

    rewrite(folder, refit)
    with pytest.raises(CheckpointError, match=said):
        open_model(str(folder))


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", {"w": torch.randn(3, 4)})
    for name in (".metadata", "__0_0.distcp"):
        model = open_model(str(folder))
        (folder / name).touch()
        with pytest.raises(CheckpointError, match=f"{name}: was written to or touched"):
            model.check()


# Boxes of a (4, 6) tensor: begins and shapes.
CUTS = {
    "rows": [((0, 0), (1, 6)), ((1, 0), (3, 6))],
    "columns": [((0, 0), (4, 1)), ((0, 1), (4, 5))],
    "both": [((0, 0), (2, 3)), ((2, 0), (2, 3)), ((0, 3), (2, 3)), ((2, 3), (2, 3))],
    "a pinwheel": [((0, 0), (1, 4)), ((0, 4), (3, 2)), ((3, 2), (1, 4)), ((1, 0), (3, 2)),
                   ((1, 2), (2, 2))],
    "an empty part": [((0, 0), (0, 6)), ((0, 0), (4, 6))],
}  # fmt: skip


@pytest.mark.parametrize("cut", CUTS)
def test_any_range_of_a_tensor_in_parts(tmp_path: Path, cut: str) -> None:
    whole = np.arange(24, dtype=np.float32).reshape(4, 6)
    raw = b""
    places = []
    for begin, shape in CUTS[cut]:
        places.append((begin, shape, len(raw)))
        raw += whole[tuple(slice(b, b + s) for b, s in zip(begin, shape, strict=True))].tobytes()
    (tmp_path / "parts").write_bytes(raw)
    file = InputFile(tmp_path / "parts")
    boxes = [Box(begin, shape, file, start) for begin, shape, start in places]
    assert why_not_whole((4, 6), boxes) is None
    tensor = BoxedTensor(TensorInfo("w", "float32", (4, 6)), boxes)
    due = whole.tobytes()
    for begin in range(0, len(due) + 1):
        for end in range(begin, len(due) + 1, 1 + begin % 7):
            held = bytearray(b"\xff" * (end - begin))
            tensor.read_into(begin, memoryview(held))
            assert held == due[begin:end], (begin, end)


@pytest.mark.parametrize(
    ("boxes", "why"),
    [
        ([((0, 0), (4, 5))], "lacks 4 of its 24 elements"),
        ([((0, 0), (4, 5)), ((0, 1), (4, 1))], "has parts that overlap"),
        ([((0, 0), (4, 6)), ((0, 0), (4, 1))], "has parts that overlap"),
        ([], "lacks 24 of its 24 elements"),
    ],
)
def test_parts_that_make_no_tensor(
    tmp_path: Path, boxes: list[tuple[tuple[int, int], tuple[int, int]]], why: str
) -> None:
    (tmp_path / "parts").write_bytes(b"")
    file = InputFile(tmp_path / "parts")
    assert why_not_whole((4, 6), [Box(begin, shape, file, 0) for begin, shape in boxes]) == why
