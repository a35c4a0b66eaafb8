"""The part of gpu_check.py that merges folders: files compared with the CPU engine's, memory that
runs out, the speed of a merge beside that of the bus.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gpu_correctness
import torch

from pymerge.checkpoint.types import Source
from pymerge.engine.merge import merge_checkpoints
from pymerge.methods._statistics import SolveOptions
from pymerge.recipe.model import MergeRecipe, TensorTask
from pymerge.rules.ties import resolve_options

Keep = Callable[[dict[str, Any]], None]
SIZES = [4096, 1024, 14336, 5003, 70_001, 1 << 20, (1 << 22) + 7, 3 << 20, 33]
SOLVED = [(512, 256), (512, 256), (256, 512), (64, 64)]
SOLVED_BAR = 1e-5  # of a tensor's norm (docs/spec/mats.md)
SPEED_TENSORS, SPEED_ELEMENTS, SPEED_MODELS = 8, 1 << 26, 3
OPTIONS: dict[str, dict[str, Any]] = {
    "ties": {"density": 0.2},
    "dare": {"trim": "random", "density": 0.3, "rescale": "l1"},
    "breadcrumbs": {"trim": "outliers", "density": 0.8, "gamma": 0.05},
    "paper": {"flavor": "paper", "density": 0.2},
    "linear": {"trim": "none", "elect": "none"},
}


def engine(seconds: float, keep: Keep) -> dict[str, Any]:
    """Merges on the device and on the CPU, alternating, then one that is timed."""
    end = time.monotonic() + seconds
    result: dict[str, Any] = {"failures": [], "rows": [], "summary": {"compared": 0}}
    try:
        import safetensors.torch  # noqa: F401  what the engine reads and writes
    except ImportError as error:
        result["summary"] = f"not run: {error}"
        return result
    steps = (_compare_all, _compare_solved, _run_out_of_memory, _time)
    with tempfile.TemporaryDirectory(dir=_fast_folder(), prefix="gpu-engine-") as name:
        for step in steps:
            try:
                step(Path(name), end, result)
            except Exception as error:
                result["failures"].append(
                    f"{step.__name__[1:]}: {type(error).__name__}: {str(error)[-1500:]}"
                )
            keep(result)
    return result


def _fast_folder() -> str | None:
    """Memory, where there is enough: a merge is to be measured against the bus, not the disk."""
    shm = Path("/dev/shm")
    need = (SPEED_MODELS + 4) * SPEED_TENSORS * SPEED_ELEMENTS * 2
    roomy = shm.is_dir() and os.access(shm, os.W_OK) and shutil.disk_usage(shm).free > need
    return str(shm) if roomy else None


def write_models(
    root: Path, sizes: Sequence[int], count: int, dtype: torch.dtype, seed: int
) -> list[Path]:
    """A base and `count` fine-tuned models as folders."""
    from safetensors.torch import save_file

    device = gpu_correctness.DEVICE
    g = torch.Generator(device=device).manual_seed(seed)
    base = [torch.randn(n, generator=g, device=device) * 0.02 for n in sizes]
    folders = []
    for k in range(count + 1):
        folder = root / f"model{k}"
        folder.mkdir(parents=True)
        state = {
            f"layers.{j}.weight": (
                (b + 0.002 * torch.randn(len(b), generator=g, device=device) if k else b)
                .to(dtype)
                .cpu()
            )
            for j, b in enumerate(base)
        }
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        folders.append(folder)
    return folders


def recipe(folders: Sequence[Path], **options: Any) -> MergeRecipe:
    """All tensors with the same options."""
    chosen = resolve_options(len(folders) - 1, **options)

    def tasks(headers: Any) -> list[TensorTask]:
        return [
            TensorTask(
                name,
                tuple(Source(k, name) for k in range(1, len(folders))),
                Source(0, name),
                chosen,
                "ties",
            )
            for name in headers[0].tensors
        ]

    return MergeRecipe(tuple(map(str, folders)), 0, "ties", tasks, text="{}")


@contextmanager
def _backend(name: str) -> Any:
    before = os.environ.get("PYMERGE_BACKEND")
    os.environ["PYMERGE_BACKEND"] = name
    try:
        yield
    finally:
        del os.environ["PYMERGE_BACKEND"]
        if before is not None:
            os.environ["PYMERGE_BACKEND"] = before


def _usable() -> list[str]:
    return [
        name for name, module in gpu_correctness.backends().items() if not isinstance(module, str)
    ]


def _compare_all(root: Path, end: float, result: dict[str, Any]) -> None:
    for seed, dtype in enumerate((torch.bfloat16, torch.float32)):
        folders = write_models(root / str(seed), SIZES, 3, dtype, seed)
        for what, options in OPTIONS.items():
            chosen = recipe(folders, **options)
            wanted = root / "cpu"
            merge_checkpoints(chosen, wanted, overwrite=True, seed=5)
            for name in _usable():
                for memory in (None, "64MB", "20MB"):
                    if time.monotonic() > end - 20:
                        result["summary"]["stopped"] = f"out of time before {what}, {dtype}"
                        return
                    with _backend(name):
                        merge_checkpoints(
                            chosen,
                            root / "gpu",
                            overwrite=True,
                            device="cuda",
                            device_memory=memory,
                            seed=5,
                        )
                    if _weights(root / "gpu") != _weights(wanted):
                        result["failures"].append(
                            f"{name}, {what}, {dtype}, memory {memory}: other bytes than on the CPU"
                        )
                    result["summary"]["compared"] += 1
        shutil.rmtree(root / str(seed))


def write_statistics(path: Path, state: Mapping[str, torch.Tensor], seed: int) -> Path:
    """Random sums of a model's matrices, in the format of docs/spec/statistics.md."""
    from pymerge.statistics._file import pack, write

    g = torch.Generator().manual_seed(seed)
    header: dict[str, Any] = {"normalisation": "sum"}
    header |= {field: {} for field in ("layers", "parameters", "tensors", "aliases", "skipped")}
    header |= {"data": [], "settings": {}}
    header["model"] = {"name": None, "class": "Random", "fingerprint": str(seed)}
    sums: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if tensor.ndim != 2:
            continue
        layer = name.removesuffix(".weight")
        d_out, d_in = tensor.shape
        header["layers"][layer] = {
            "d_in": d_in,
            "d_out": d_out,
            "transposed": False,
            "weight": name,
        }
        for kind, d in (("output_grad_gram", d_out), ("input_gram", d_in)):
            rows = torch.randn(4 * d, d, generator=g) * torch.linspace(0.1, 1, d)
            key = f"{kind}/{layer}"
            sums[key] = pack(rows.T @ rows)
            header["tensors"][key] = {"tokens": 4 * d, "examples": 4 * d, "draws": 4 * d}
    write(path, header, sums.items())
    return path


def _solved_recipe(method: str, folders: Sequence[str], files: Sequence[str]) -> MergeRecipe:
    """All layers by their statistics, what has none averaged."""
    average = resolve_options(len(folders), trim="none", elect="none", density=1.0)
    solve = SolveOptions(method, "average", (), ())

    def tasks(headers: Any) -> list[TensorTask]:
        names = headers[0].tensors
        sources = {name: tuple(Source(k, name) for k in range(len(folders))) for name in names}
        return [TensorTask(n, s, None, average, "average", solve=solve) for n, s in sources.items()]

    return MergeRecipe(tuple(folders), None, method, tasks, text="{}", statistics=tuple(files))


def _compare_solved(root: Path, end: float, result: dict[str, Any]) -> None:
    """Layers with statistics, solved on the device as far as they fit, against those of the CPU
    (docs/spec/mats.md).
    """
    from safetensors.torch import load_file, save_file

    folders, files = [], []
    for k in range(2):
        folder = root / f"solved{k}"
        folder.mkdir()
        g = torch.Generator().manual_seed(k)
        state = {
            f"layers.{j}.weight": 0.02 * torch.randn(*shape, generator=g)
            for j, shape in enumerate([*SOLVED, (5003,)])
        }
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        folders.append(str(folder))
        files.append(str(write_statistics(root / f"{k}.stats.safetensors", state, k)))
    result["summary"]["solved"] = 0
    for method in ("mats", "regmean"):
        chosen = _solved_recipe(method, folders, files)
        merge_checkpoints(chosen, root / "cpu", overwrite=True)
        wanted = load_file(root / "cpu/model.safetensors")
        for memory in (None, "100MB", "24MB"):
            if time.monotonic() > end - 20:
                result["summary"]["stopped"] = f"out of time before {method}, memory {memory}"
                return
            options = {"device": "cuda", "device_memory": memory}
            summary = merge_checkpoints(chosen, root / "gpu", overwrite=True, **options)
            for name, tensor in load_file(root / "gpu/model.safetensors").items():
                apart = float((tensor - wanted[name]).norm() / wanted[name].norm())
                if not apart <= (SOLVED_BAR if tensor.ndim == 2 else 0):
                    result["failures"].append(
                        f"{method}, memory {memory}: {name} is {apart:.1e} off"
                    )
            if not any("were solved on" in note for note in summary.notes) and memory != "24MB":
                result["failures"].append(f"{method}, memory {memory}: nothing was solved there")
            result["summary"]["solved"] += 1


def _weights(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]


def _run_out_of_memory(root: Path, end: float, result: dict[str, Any]) -> None:
    """Let torch have less than is asked for, and see the parts halved."""
    folders = write_models(root / "memory", SIZES, 3, torch.bfloat16, 9)
    chosen = recipe(folders, density=0.2)
    merge_checkpoints(chosen, root / "cpu", overwrite=True)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    allowed = torch.cuda.memory_reserved() + (48 << 20)
    torch.cuda.set_per_process_memory_fraction(allowed / total)
    try:
        summary = merge_checkpoints(
            chosen, root / "gpu", overwrite=True, device="cuda", device_memory="400MB"
        )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    if not any("ran out of memory" in note for note in summary.notes):
        result["failures"].append(f"memory did not run out: {summary.notes}")
    if _weights(root / "gpu") != _weights(root / "cpu"):
        result["failures"].append("out of memory: other bytes than on the CPU")
    result["summary"]["out of memory"] = "parts halved"
    shutil.rmtree(root / "memory")


def _time(root: Path, end: float, result: dict[str, Any]) -> None:
    """Three models and a base, a gigabyte each in bf16, from the page cache or memory."""
    to_device, to_host = bus_bandwidth()
    result["bus_gb_per_s"] = {"to the device": to_device, "to the host": to_host}
    sizes = [SPEED_ELEMENTS] * SPEED_TENSORS + [4096] * 100
    folders = write_models(root / "speed", sizes, SPEED_MODELS, torch.bfloat16, 3)
    chosen = recipe(folders, density=0.2)
    for name in [*_usable(), *_usable(), "cpu"]:  # each once more: the first starts the backend
        if time.monotonic() > end and result["rows"]:
            break
        options = {} if name == "cpu" else {"device": "cuda"}
        with _backend("auto" if name == "cpu" else name):
            summary = merge_checkpoints(chosen, root / "out", overwrite=True, **options)
        read = summary.bytes_read / summary.seconds / 1e9
        result["rows"].append(
            {
                "what": (
                    f"merge of {SPEED_MODELS} models from"
                    f" {'memory' if _fast_folder() else 'the page cache'}"
                ),
                "backend": name,
                "ms_p50": 1e3 * summary.seconds,
                "gb_per_s": summary.gb_per_s,
                "note": f"inputs at {read:.1f} GB/s, {100 * read / to_device:.0f} % of the bus",
            }
        )


def bus_bandwidth() -> tuple[float, float]:
    """GB/s of copies from and to pinned memory, in buffers of the engine's size; the best of a
    few.
    """
    host = torch.empty(32 << 20, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(32 << 20, dtype=torch.uint8, device=gpu_correctness.DEVICE)
    best = []
    for target, source in ((device, host), (host, device)):
        seconds = []
        for _ in range(5):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(8):
                target.copy_(source, non_blocking=True)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
        best.append(8 * host.numel() / min(seconds) / 1e9)
    return best[0], best[1]
