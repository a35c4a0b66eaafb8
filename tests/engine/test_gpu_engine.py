"""Merging folders on a GPU, with host memory in the GPU's place: the files are those of the CPU,
byte for byte.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from folder_cases import (
    assert_same,
    family,
    read_result,
    recipe,
    write_family,
    write_model,
    write_sharded,
)
from host_device import HostDevice
from safetensors.torch import save_file

import pymerge
from pymerge.backends import cuda, native, registry
from pymerge.checkpoint.types import Source
from pymerge.engine.gpu import batches, device
from pymerge.engine.merge import merge_checkpoints, plan_checkpoints
from pymerge.errors import ConfigError, DeviceError, NonFiniteError
from pymerge.messages.arguments import named_as
from pymerge.planning.plan import Plan, PlannedTensor
from pymerge.recipe.model import MergeRecipe, TensorTask
from pymerge.reference import ties as reference
from pymerge.rules.ties import resolve_options

METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "task_arithmetic": {"lambda": 0.7},
    "ties": {"density": 0.4},
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.6},
    "breadcrumbs_ties": {"density": 0.6, "gamma": 0.1},
}
SCHEDULES = ["late", "at once", "any"]
# Device memory: all tensors in one batch; each in one of its own or two; the larger ones only in
# parts.
MEMORY = {"one batch": 1 << 20, "batches": 16 << 10, "parts": 5 << 10}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Call it with a device to have it used; at the end nothing of the engine is left running."""
    yield (
        lambda made: (
            monkeypatch.setattr("pymerge.engine.merge.open_device", lambda index: made) or made
        )
    )
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith("pymerge-")], names


def files(folder: Path) -> dict[str, bytes]:
    """All but the model card, whose title is the folder's name."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "README.md"}


def same_files(one: Path, other: Path) -> None:
    found, wanted = files(one), files(other)
    assert found.keys() == wanted.keys()
    assert not [name for name in found if found[name] != wanted[name]]


def compare(root: Path, config: Any, memory: int | str | None = None, **options: Any) -> Any:
    """Merge on both; the same files and counts. Returns what the GPU's summary says."""
    on_cpu = merge_checkpoints(config, root / "cpu", **options)
    summary = merge_checkpoints(
        config, root / "gpu", device="cuda", device_memory=memory, **options
    )
    same_files(root / "gpu", root / "cpu")
    for field in ("methods", "bytes_read", "bytes_written", "tensors", "files"):
        assert getattr(summary, field) == getattr(on_cpu, field)
    return summary


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("size", MEMORY)
@pytest.mark.parametrize("method", METHODS)
def test_methods(tmp_path: Path, gpu: Any, method: str, size: str, schedule: str) -> None:
    made = gpu(HostDevice(schedule))
    config = recipe(method, write_family(tmp_path), **METHODS[method])
    summary = compare(tmp_path, config, MEMORY[size], out_shard_size=3000, seed=5)
    assert made.most_memory <= MEMORY[size]
    assert made.jobs > 9 or size != "parts"
    assert (made.merges == 1) == (size == "one batch")
    assert summary.notes == ("computed on host memory by the kernels of backend 'test'",)


@pytest.mark.parametrize("seed", range(12))
def test_any_order_of_streams(tmp_path: Path, gpu: Any, seed: int) -> None:
    gpu(HostDevice("any", seed=seed))
    config = recipe("ties", write_family(tmp_path, 3, torch.float32), density=0.3)
    compare(tmp_path, config, 8000 + 2000 * seed)


@pytest.mark.parametrize("size", MEMORY)
def test_with_the_kernels(tmp_path: Path, gpu: Any, emulated: Any, monkeypatch: Any, size: str) -> None:  # fmt: skip
    monkeypatch.setattr(native, "cuda", lambda: emulated.cuda)
    monkeypatch.setattr(cuda, "place", lambda device: (0, 3, 0))
    for method in ("ties", "dare_ties", "breadcrumbs"):
        root = tmp_path / method
        gpu(HostDevice("any", ties_many=cuda.ties_many))
        config = recipe(method, write_family(root, 3), **METHODS.get(method, {"density": 0.6}))
        compare(root, config, MEMORY[size], seed=7)


@pytest.mark.parametrize("size", MEMORY)
def test_inputs_of_every_form(tmp_path: Path, gpu: Any, monkeypatch: Any, size: str) -> None:
    base, one, two, three = family(3, torch.float32)
    one = {name: t.half() for name, t in one.items()}
    two = {name: t.bfloat16() for name, t in two.items()}
    three = {name: t.t().contiguous().t() if t.dim() == 2 else t for name, t in three.items()}
    folders = [write_model(tmp_path / "base", base), write_sharded(tmp_path / "m1", one)]
    save_file(two, tmp_path / "m2.safetensors")
    torch.save(three, tmp_path / "m3.pt")
    folders += [tmp_path / "m2.safetensors", tmp_path / "m3.pt"]
    gpu(HostDevice("any"))
    config = recipe("ties", folders, density=0.5)
    monkeypatch.setenv("PYMERGE_IO", "mmap")
    compare(tmp_path, config, MEMORY[size], out_shard_size=3000)
    monkeypatch.setenv("PYMERGE_IO", "read")
    compare(tmp_path / "read", config, MEMORY[size], out_shard_size=3000)


def everywhere(folders: list[Path], **options: Any) -> MergeRecipe:
    """All tensors with the same options of `ties`, of which configurations have only some."""
    chosen = resolve_options(len(folders) - 1, **options)

    def tasks(headers: Any) -> list[TensorTask]:
        sources = [tuple(Source(k, n) for k in range(1, len(folders))) for n in headers[0].tensors]
        return [
            TensorTask(n, s, Source(0, n), chosen, "ties")
            for n, s in zip(headers[0].tensors, sources, strict=True)
        ]

    return MergeRecipe(tuple(map(str, folders)), 0, "ties", tasks)


@pytest.mark.parametrize(
    "options",
    [
        {"flavor": "paper", "density": 0.3},
        {"flavor": "paper", "density": 0.3, "scope": "tensor", "elect": "count"},
        {"scope": "model", "trim": "outliers", "density": 0.5, "gamma": 0.1},
        {"scope": "model", "density": 0.5, "rescale": "l2"},
        {"density": 0.5, "rescale": "l2"},
        {"trim": "random", "density": 0.5, "rescale": "l1", "zero_sign": "majority"},
        {"trim": "outliers", "density": 0.5, "gamma": 0.1, "rescale": "linf", "elect": "none"},
        {"trim": "none", "zero_sign": "majority", "elect": "count"},
        {"density": 0.0},
        {"density": 1.0, "rescale": "density"},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", MEMORY)
def test_what_a_whole_tensor_or_model_decides(tmp_path: Path, gpu: Any, size: str, options: Any) -> None:  # fmt: skip
    gpu(HostDevice("any"))
    folders = write_family(tmp_path, dtype=torch.float32)
    # Few values, so that signs cancel and the majority decides.
    for folder in folders:
        state = {n: (t * 2).round() / 2 for n, t in family(1, torch.float32, len(folder.name))[1].items()}  # fmt: skip
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    compare(tmp_path, everywhere(folders, **options), MEMORY[size])


def test_wide_tensors_and_many_models(tmp_path: Path, gpu: Any) -> None:
    made = gpu(HostDevice("late"))
    compare(tmp_path / "wide", recipe("ties", write_family(tmp_path / "wide", 2, torch.float64), density=0.3), 12_000)  # fmt: skip
    merged = made.merges
    assert merged
    folders = write_family(tmp_path / "many", 65)
    compare(tmp_path / "many", recipe("ties", folders, density=0.3), 1 << 20)
    assert made.merges == merged  # more models than the kernels take: the CPU


def test_what_is_copied_and_what_is_empty(tmp_path: Path, gpu: Any) -> None:
    gpu(HostDevice("late"))
    folders = []
    for k, state in enumerate(family(2)):
        state |= {"ids": torch.arange(9), "none": torch.empty(0, 3), "one": torch.tensor(1.0 + k)}
        folders.append(write_model(tmp_path / f"m{k}", state))
    compare(tmp_path, recipe("ties", folders, density=0.3), 6000)


# Memory runs out.


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("out_at", [[1], [2], [3, 4], [2, 5, 6], [1, 2, 3]], ids=str)
@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_out_of_memory_halves_the_parts(
    tmp_path: Path, gpu: Any, method: str, out_at: list[int], schedule: str
) -> None:
    gpu(HostDevice(schedule, out_at=out_at))
    config = recipe(method, write_family(tmp_path), density=0.4)
    summary = compare(tmp_path, config, 32 << 10, out_shard_size=3000)
    said = [note for note in summary.notes if "ran out of memory" in note]
    assert len(said) == 1
    assert f"in {(32 << 10) >> len(out_at)} bytes instead of {32 << 10}" in said[0]


def test_less_memory_than_allowed(tmp_path: Path, gpu: Any) -> None:
    made = gpu(HostDevice("late", memory=5000))
    config = recipe("ties", write_family(tmp_path), density=0.4)
    summary = compare(tmp_path, config, 64 << 10)
    assert made.most_memory <= 5000
    assert "in 4096 bytes instead of 65536" in summary.notes[-1]


@pytest.mark.parametrize("lacking", [{"memory": 400}, {"out_at": range(100)}], ids=str)
def test_no_room_at_all(tmp_path: Path, gpu: Any, lacking: Any) -> None:
    gpu(HostDevice(**lacking))
    folders = write_family(tmp_path)
    with pytest.raises(DeviceError, match=r"host memory has no room.*pass device='cpu'"):
        merge_checkpoints(
            recipe("ties", folders), tmp_path / "out", device="cuda", device_memory=10_000
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "m1", "m2"]


def test_memory_that_holds_no_part(tmp_path: Path, gpu: Any) -> None:
    gpu(HostDevice())
    folders = write_family(tmp_path, 12, torch.float64)
    with pytest.raises(DeviceError, match=r"do not hold a part of 12 models.*device_memory"):
        merge_checkpoints(
            recipe("ties", folders), tmp_path / "out", device="cuda", device_memory=8192
        )


def test_the_default_memory() -> None:
    """Nine tenths of what is free, as far as there is a use for it."""
    assert device.default_memory(HostDevice(memory=10**9), 10**10) == 9 * 10**8
    assert device.default_memory(HostDevice(memory=80 * 10**9), 13 * 10**9) == 13 * 10**9


def test_memory_that_there_is_a_use_for(tmp_path: Path) -> None:
    """All of a 70B model's tensors stay whole: four of the largest with their inputs fit."""
    shape = (8192, 28672)
    tensor = PlannedTensor("w", shape, "bfloat16", "ties", (), None, resolve_options(4), "w")
    plan = Plan(("m",), (tensor,), 0, (), (), largest_set=6 * 2 * 8192 * 28672)
    assert plan.gpu_memory == 5 * plan.largest_set
    share = batches.room_for(plan.gpu_memory) // 4
    assert share >= plan.largest_set
    assert replace(plan, largest_set=100).gpu_memory == 10**9
    assert not plan.gpu_pays
    folders = write_family(tmp_path)
    found = plan_checkpoints(recipe("ties", folders))
    largest = max(t.nbytes for t in found.tensors if t.options is not None)
    assert found.largest_set == (len(folders) + 1) * largest


def test_auto_stays_on_the_cpu_where_elements_are_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pymerge.engine.merge.open_device", None)
    config = recipe("ties", write_family(tmp_path))
    summary = merge_checkpoints(config, tmp_path / "out", device="auto", device_memory="1GB")
    assert not any("computed on" in note for note in summary.notes)
    merge_checkpoints(config, tmp_path / "cpu")
    same_files(tmp_path / "out", tmp_path / "cpu")


def test_small_tensors_share_a_call() -> None:
    """300 norms of a model take a handful of launches, and no batch is larger than a fourth of the
    room.
    """
    rule = resolve_options(4).rule(4096)
    stored = SimpleNamespace(info=SimpleNamespace(dtype="bfloat16"))
    works = [
        batches.DeviceTensor(j, 4096, (stored,) * 5, 4, "bfloat16", rule, False) for j in range(300)
    ]
    made = list(batches.batches(works, 256 << 20))
    assert len(made) <= 4
    assert [part.tensor.index for batch in made for part in batch.parts] == list(range(300))
    assert max(batch.nbytes for batch in made) <= batches.room_for(256 << 20) // 4
    mixed = [replace(w, elements=200_000 * (1 + w.index % 90)) for w in works]
    for batch in batches.batches(mixed, 256 << 20):
        assert batch.nbytes <= batches.room_for(256 << 20)
        ends = [p + part.count * 2 for part in batch.parts for p in part.places]
        assert max(ends) <= batch.input_bytes <= batch.parts[0].out


# Errors, interruptions.


def test_values_that_are_not_finite(tmp_path: Path, gpu: Any) -> None:
    gpu(HostDevice("any"))
    states = family(2)
    states[2]["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.nan
    folders = [write_model(tmp_path / f"m{k}", state) for k, state in enumerate(states)]
    config = recipe("ties", folders)
    found = []
    for options in ({}, {"device": "cuda", "device_memory": 5000}):
        with pytest.raises(NonFiniteError) as error:
            merge_checkpoints(config, tmp_path / "out", **options)
        found.append(str(error.value))
    assert found[0] == found[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m0", "m1", "m2"]
    for name, options in (("cpu", {}), ("gpu", {"device": "cuda", "device_memory": 5000})):
        merge_checkpoints(config, tmp_path / name, allow_non_finite=True, **options)
    assert_same(read_result(tmp_path / "gpu"), read_result(tmp_path / "cpu"))


def test_an_input_cut_short_while_it_is_read(tmp_path: Path, gpu: Any, monkeypatch: Any) -> None:
    gpu(HostDevice("late"))
    folders = write_family(tmp_path)

    def fails(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("pymerge.checkpoint.stored.InputFile.read_into", fails)
    with pytest.raises(OSError, match="Input/output error"):
        merge_checkpoints(recipe("ties", folders), tmp_path / "out", device="cuda")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "m1", "m2"]


@pytest.mark.parametrize("first", ["cpu", "cuda"])
def test_interrupted_on_one_and_resumed_on_the_other(tmp_path: Path, gpu: Any, first: str) -> None:
    gpu(HostDevice("any"))
    config = recipe("ties", write_family(tmp_path), density=0.4)
    seen: list[str] = []

    def stop(done: int, total: int, name: str) -> None:
        seen.append(name)
        if len(seen) == 6:
            raise KeyboardInterrupt

    options = {"out_shard_size": 1500}
    with pytest.raises(KeyboardInterrupt):
        merge_checkpoints(config, tmp_path / "out", device=first, progress=stop, **options)
    second = {"cpu": "cuda", "cuda": "cpu"}[first]
    summary = merge_checkpoints(config, tmp_path / "out", device=second, resume=True, **options)
    assert summary.resumed
    merge_checkpoints(config, tmp_path / "clean", **options)
    same_files(tmp_path / "out", tmp_path / "clean")


KILLED = """
import json, os, signal, sys
from host_device import HostDevice
import pymerge.engine.merge

pymerge.engine.merge.open_device = lambda index: HostDevice("any")
config, out = json.loads(sys.argv[1])
seen = []

def progress(*done):
    seen.append(done)
    if len(seen) == 6:
        os.kill(os.getpid(), signal.SIGKILL)

pymerge.engine.merge.merge_checkpoints(config, out, out_shard_size=1500, device="cuda", progress=progress)
"""


def test_killed_and_resumed(tmp_path: Path, gpu: Any) -> None:
    config, out = recipe("dare_ties", write_family(tmp_path), density=0.4), tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), json.dumps([config, str(out)])],
        cwd=Path(__file__).parents[1], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    gpu(HostDevice("late"))
    options = {"out_shard_size": 1500, "device": "cuda", "device_memory": 5000}
    assert merge_checkpoints(config, out, resume=True, **options).resumed
    merge_checkpoints(config, tmp_path / "clean", out_shard_size=1500)
    same_files(out, tmp_path / "clean")


# Which device.


class Passed:
    """A stream or an event of a device on which everything has happened already."""

    def __init__(self, device: Any = None, *, blocking: bool = False) -> None:
        self.blocking = blocking

    def wait_event(self, event: Passed) -> None:
        assert isinstance(event, Passed)

    def record(self, stream: Passed) -> None:
        assert isinstance(stream, Passed)

    def synchronize(self) -> None:
        assert self.blocking  # a thread that waits leaves the processor to others


def test_the_calls_of_torch(tmp_path: Path, gpu: Any, monkeypatch: Any) -> None:
    """TorchDevice as it is, over a torch.cuda that is as simple as can be."""
    empty, host = torch.empty, torch.device("cpu")

    def on_the_host(*size: Any, pin_memory: bool = False, device: Any = None, **options: Any) -> Any:  # fmt: skip
        return empty(*size, **options)

    def entered(what: Any) -> Any:
        assert isinstance(what, (Passed, torch.device))
        return contextlib.nullcontext()

    monkeypatch.setattr(torch, "empty", on_the_host)
    for name, value in {
        "Stream": Passed,
        "Event": Passed,
        "stream": entered,
        "device": entered,
        "get_device_name": lambda device: f"a GPU, {device}",
        "mem_get_info": lambda device: (1 << 30, 1 << 31),
        "synchronize": lambda device: None,
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)

    def ties_many(jobs: Any) -> Any:
        assert all(tensor.device == host for models, *_ in jobs for tensor in models)
        stats = [reference.ties(*job) for job in jobs]
        return [SimpleNamespace(resolve=lambda one=one: one) for one in stats]

    gpu(device.TorchDevice(1, "cuda", ties_many))
    summary = compare(tmp_path, recipe("ties", write_family(tmp_path), density=0.4))
    assert summary.notes == ("computed on a GPU, cuda:1 by the kernels of backend 'cuda'",)


@pytest.mark.parametrize("asked", ["gpu", "cuda:", "cuda:x", "cuda:-1", "CUDA", "mps", ""])
def test_devices_that_are_none(tmp_path: Path, asked: str) -> None:
    with pytest.raises(ConfigError, match=r"is not one of 'cpu', 'cuda', 'cuda:1'"):
        merge_checkpoints({}, tmp_path / "out", device=asked)


def test_memory_of_a_gpu(tmp_path: Path, gpu: Any) -> None:
    gpu(HostDevice())
    folders = write_family(tmp_path)
    with pytest.raises(ConfigError, match="device_memory='1GB' is for a GPU; pass device='cuda'"):
        merge_checkpoints({}, tmp_path / "out", device_memory="1GB")
    with pytest.raises(ValueError, match="device_memory='lots' is not a size"):
        merge_checkpoints({}, tmp_path / "out", device="cuda", device_memory="lots")
    with pytest.raises(ConfigError, match="device_memory=100 bytes is too little"):
        merge_checkpoints(
            recipe("linear", folders), tmp_path / "out", device="cuda", device_memory=100
        )


def test_why_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYMERGE_BACKEND", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(DeviceError, match=r"a build without CUDA; install one.*or pass device='cpu'"):  # fmt: skip
        device.open_device(0)
    with (
        named_as({"device": "--device"}),
        pytest.raises(DeviceError, match="or leave out --device"),
    ):
        device.open_device(0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(DeviceError, match="no CUDA device is visible to torch; see what nvidia-smi"):  # fmt: skip
        device.open_device(0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(
        DeviceError, match="device='cuda:2' is not there; torch sees cuda:0, cuda:1"
    ):
        device.open_device(2)
    monkeypatch.setattr(registry, "why_not", lambda backend: f"no {backend}")
    with pytest.raises(DeviceError, match="'cuda' is not available: no cuda; backend 'triton' is"):
        device.open_device(0)
    monkeypatch.setenv("PYMERGE_BACKEND", "cpu")
    with pytest.raises(DeviceError, match="PYMERGE_BACKEND='cpu' does not merge folders on a GPU"):
        device.open_device(0)


def test_triton_where_the_extension_has_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYMERGE_BACKEND", raising=False)
    monkeypatch.setattr(registry, "why_not", lambda b: "no CUDA" if b == "cuda" else None)
    name, function = registry.pick_many()
    assert (name, function.__module__) == ("triton", "pymerge.triton_kernels.ties._api")
    monkeypatch.setenv("PYMERGE_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="'cuda' is not available: no CUDA"):
        registry.pick_many()


def test_the_command(tmp_path: Path, gpu: Any) -> None:
    from click.testing import CliRunner

    from pymerge.cli.main import commands

    gpu(HostDevice())
    path = tmp_path / "recipe.yml"
    path.write_text(json.dumps(recipe("linear", write_family(tmp_path))))
    run = CliRunner().invoke
    done = run(commands, ["merge", str(path), str(tmp_path / "out"), "--device", "cuda:0", "--device-memory", "1MB"])  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "computed on host memory" in done.output
    done = run(commands, ["merge", str(path), str(tmp_path / "new"), "--device-memory", "big"])
    assert done.exit_code == 2 and "'big' is not a size" in done.output


def test_nothing_here_imports_torch_for_the_cpu(tmp_path: Path) -> None:
    config = json.dumps(recipe("ties", write_family(tmp_path)))
    code = (
        "import sys, json; from pymerge.engine.merge import merge_checkpoints;"
        f"merge_checkpoints(json.loads({config!r}), {str(tmp_path / 'out')!r});"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(pymerge.__file__).parents[1])
