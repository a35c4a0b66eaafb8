"""Layers with statistics in merges on a GPU, with host memory in the GPU's place: what is solved
there, and what where it is full.
"""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from folder_cases import family, read_result, write_family
from host_device import HostDevice
from mats_cases import case, relative
from solve_cases import recipe, write_statistics

from pymerge.engine.gpu import batches, solve
from pymerge.engine.gpu.device import TorchDevice
from pymerge.engine.gpu.sizes import DeviceSizes
from pymerge.engine.merge import merge_checkpoints, plan_checkpoints
from pymerge.errors import DeviceError
from pymerge.ops.mats.api import mats_many
from pymerge.ops.mats.layer import MatsLayer, to_device

SIZES = DeviceSizes(align=16, scratch=8, least=1 << 10, in_buffer=4096, out_buffer=4096, piece=4096)
KINDS = ("input_gram", "output_grad_gram", "diagonal_fisher")


class Calls:
    """`mats_many` as the solver calls it. fails: numbers of calls that raise; all: whether every
    one on the device does.
    """

    def __init__(self, fails: Any = (), error: type[Exception] = torch.OutOfMemoryError, said: str = "no") -> None:  # fmt: skip
        self.fails, self.error, self.said = fails, error, said
        self.there: list[list[str]] = []
        self.on_host: list[str] = []
        self.held: list[weakref.ref[Any]] = []

    def __call__(self, layers: Any, **options: Any) -> Any:
        layers = list(layers)
        if "backend" in options:
            assert options["backend"] == "cpu"
            self.on_host += [layer.name for layer in layers]
            return mats_many(layers, **options)
        self.there.append([layer.name for layer in layers])
        self.held = [weakref.ref(layer) for layer in layers]
        if len(self.there) in self.fails:
            raise self.error(self.said)
        return mats_many(layers, **options)


class Device(HostDevice):
    """Looks, when it is asked to free memory, whether anything still holds what was to be
    solved.
    """

    calls: Calls
    tidied = 0
    watches = True

    def tidy(self) -> None:
        gc.collect()
        assert not (self.watches and [layer for layer in self.calls.held if layer() is not None])
        self.tidied += 1


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Any:
    def use(calls: Calls) -> Device:
        made = Device("any", sizes=SIZES)
        made.calls = calls
        monkeypatch.setattr("pymerge.engine.merge.open_device", lambda index: made)
        monkeypatch.setattr(solve, "mats_many", calls)
        return made

    return use


@pytest.fixture
def models(tmp_path: Path) -> tuple[list[Path], list[Path]]:
    folders = write_family(tmp_path, dtype=torch.float32)
    states = family(dtype=torch.float32)
    files = [write_statistics(tmp_path / f"{k}.stats", states[k], k, kinds=KINDS) for k in (1, 2)]
    return folders, files


def needs(config: Any) -> dict[str, int]:
    return {t.name: t.solve_memory for t in plan_checkpoints(config).tensors if t.solve_memory}


def compare(root: Path, config: Any, memory: int | None = None) -> Any:
    """The same tensors, reports and counts as on the CPU, to rounding."""
    on_cpu = merge_checkpoints(config, root / "cpu")
    summary = merge_checkpoints(config, root / "gpu", device="cuda", device_memory=memory)
    want, got = read_result(root / "cpu"), read_result(root / "gpu")
    assert list(got) == list(want)
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype
        assert relative(got[name], tensor) < 2e-6, name
    assert summary.methods == on_cpu.methods
    reports = [json.loads((root / k / "merge_report.json").read_text()) for k in ("cpu", "gpu")]
    names = [[(r["name"], r["status"]) for r in report["layers"]] for report in reports]
    assert names[0] == names[1]
    return summary


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("mats", {}),
        ("mats", {"init": "pretrained", "precision": "bf16x3"}),
        ("mats", {"init": "ties", "density": 0.5, "output_grams": False}),
        ("mats", {"iterations": [2, 7]}),
        ("regmean", {"init": "task_arithmetic", "lambda": 0.5}),
    ],
    ids=str,
)
def test_layers_are_solved_on_the_device(
    tmp_path: Path, models: Any, use: Any, method: str, parameters: Any
) -> None:
    folders, files = models
    calls = Calls()
    use(calls)
    config = recipe(method, folders[1:], files, folders[0], **parameters)
    summary = compare(tmp_path, config)
    assert sorted(name for call in calls.there for name in call) == sorted(needs(config))
    assert not calls.on_host
    assert "layers with statistics were solved on host memory" in summary.notes


def test_fisher_is_left_to_the_cpu(tmp_path: Path, models: Any, use: Any) -> None:
    folders, files = models
    calls = Calls()
    use(calls)
    summary = compare(tmp_path, recipe("fisher", folders[1:], files))
    assert not calls.there and not summary.notes
    name = "model.safetensors"
    assert (tmp_path / "cpu" / name).read_bytes() == (tmp_path / "gpu" / name).read_bytes()


def test_batches_fit_the_memory(tmp_path: Path, models: Any, use: Any) -> None:
    """Half of what is allowed is for layers, less an eighth; the other half for what goes through
    the pipeline.
    """
    folders, files = models
    config = recipe("mats", folders[1:], files)
    need = needs(config)
    memory = 2 * (max(need.values()) + min(need.values())) * 8 // 7 + 64
    calls = Calls()
    made = use(calls)
    summary = compare(tmp_path, config, memory)
    assert len(calls.there) > 1 and not calls.on_host
    sizes = [sum(need[name] for name in call) for call in calls.there]
    assert max(sizes) <= batches.room_for(memory // 2, SIZES)
    assert any(len(call) > 1 for call in calls.there)
    assert 0 < made.most_memory <= memory - memory // 2
    assert not any("ran out" in note for note in summary.notes)


def test_what_does_not_fit_is_solved_on_the_cpu(
    tmp_path: Path, models: Any, use: Any, monkeypatch: Any
) -> None:
    folders, files = models
    config = recipe("mats", folders[1:], files)
    need = needs(config)
    large = max(need.values())
    memory = 2 * (large - 1) * 8 // 7
    calls = Calls()
    use(calls)
    summary = compare(tmp_path / "one", config, memory)
    assert calls.on_host == [name for name in need if need[name] == large]
    assert len(calls.on_host) < len(need)
    (note,) = [note for note in summary.notes if "on the CPU" in note]
    assert calls.on_host[0] in note and "device_memory" in note
    # All of it, whatever backend is chosen for the device.
    merge_checkpoints(config, tmp_path / "cpu")
    monkeypatch.setenv("PYMERGE_BACKEND", "cuda")
    merge_checkpoints(config, tmp_path / "gpu", device="cuda", device_memory=8192)
    want, got = read_result(tmp_path / "cpu"), read_result(tmp_path / "gpu")
    assert all(relative(got[name], want[name]) < 2e-6 for name in want)


@pytest.mark.parametrize(
    ("fails", "error", "said"),
    [
        ([1], torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB."),
        ([1, 2], RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        ([1, 3], RuntimeError, "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDn`"),
        (range(1, 99), RuntimeError, "CUDA error: out of memory"),
    ],
    ids=["one", "two", "later", "all"],
)  # fmt: skip
def test_memory_runs_out(
    tmp_path: Path, models: Any, use: Any, fails: Any, error: Any, said: str
) -> None:
    folders, files = models
    config = recipe("mats", folders[1:], files)
    calls = Calls(fails, error, said)
    made = use(calls)
    summary = compare(tmp_path, config)
    failed = [k for k in fails if k <= len(calls.there)]
    assert made.tidied >= len(failed) > 0
    assert len(calls.there[0]) == 4 > len(calls.there[1])
    (note,) = [note for note in summary.notes if "ran out of memory" in note]
    assert "layers were solved in smaller batches" in note
    everything = len(fails) > 10
    assert not everything or sorted(calls.on_host) == sorted(needs(config))
    assert everything or len(calls.on_host) < 2
    assert ("layers with statistics were solved on host memory" in summary.notes) != everything


def test_other_errors_are_raised(tmp_path: Path, models: Any, use: Any) -> None:
    folders, files = models
    made = use(Calls([1], RuntimeError, "CUDA error: an illegal memory access was encountered"))
    made.watches = False
    with pytest.raises(RuntimeError, match="illegal memory access"):
        merge_checkpoints(recipe("mats", folders[1:], files), tmp_path / "out", device="cuda")
    assert not (tmp_path / "out").exists()


def test_a_layer_goes_there_with_all_that_it_has() -> None:
    c = case(dtype=torch.float32)
    there, copies = torch.device("meta"), dict[int, Any]()
    one = to_device(MatsLayer(c.weights, c.a, c.b, c.base, c.base), there, copies)
    two = to_device(MatsLayer(c.weights, c.a), there, copies)
    assert one.input_grams is two.input_grams
    whole = to_device(MatsLayer(c.weights, torch.stack(list(c.a))), there, copies).input_grams
    assert isinstance(whole, torch.Tensor) and whole.device == there
    held = [*one.weights, *one.input_grams, *one.output_grams, one.base, one.init]
    assert all(tensor.device == there for tensor in held)
    assert two.output_grams is None and two.base is None and two.init == "average"


@pytest.mark.parametrize("there", [True, False])
def test_auto_takes_a_gpu_where_layers_are_solved(
    tmp_path: Path, models: Any, use: Any, monkeypatch: Any, there: bool
) -> None:
    folders, files = models
    use(Calls())

    def missing(index: int) -> Any:
        raise DeviceError("no CUDA device is visible to torch")

    if not there:
        monkeypatch.setattr("pymerge.engine.merge.open_device", missing)
    config = recipe("regmean", folders[1:], files, folders[0])
    summary = merge_checkpoints(config, tmp_path / "out", device="auto")
    assert any("were solved on" in note for note in summary.notes) is there
    assert plan_checkpoints(config).gpu_pays
    fisher = recipe("fisher", folders[1:], files, folders[0])
    assert not plan_checkpoints(fisher).gpu_pays


def test_the_device_that_torch_is_told(monkeypatch: Any) -> None:
    entered = []

    class Entered:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            entered.append(self.device)

        def __exit__(self, *_: object) -> None:
            entered.append(None)

    monkeypatch.setattr(torch.cuda, "device", Entered)
    monkeypatch.setattr(torch.cuda, "get_device_name", str)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    with TorchDevice(1, "cuda", lambda jobs: None).solving() as device:
        assert device == torch.device("cuda", 1)
        assert entered == [device]
    assert entered == [device, None]
