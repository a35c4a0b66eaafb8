"""A merge of DTensors on several processes of this machine, beside the merge of the full tensors:
time, memory and what the ranks tell each other (docs/distributed.md).

    python benchmarks/bench_sharded.py [--ranks 2] [--elements 134217728] [--models 4] [--dtype float32]

Memory is Linux's: the highest resident size during the first merge, above the one before it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import pymerge

WIDTH = 4096
DENSITY = 0.2


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def shards(rank: int, rows: int, models: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """The base's shard and the models'."""
    generator = torch.Generator().manual_seed(rank)
    base = torch.empty(rows, WIDTH).normal_(0, 0.02, generator=generator)
    found = [base.to(dtype)]
    for _ in range(models):
        step = torch.empty(rows, WIDTH).normal_(0, 0.002, generator=generator)
        found.append(step.add_(base).to(dtype))
    return found


def run(rank: int, store: str, given: argparse.Namespace) -> None:
    torch.set_num_threads(max(1, given.threads // given.ranks))
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=given.ranks,
        timeout=timedelta(minutes=5),
    )  # fmt: skip
    mesh = init_device_mesh("cpu", (given.ranks,))
    dtype = getattr(torch, given.dtype)

    def spread(shard: torch.Tensor) -> torch.Tensor:
        return DTensor.from_local(shard, mesh, [Shard(0)], run_check=False)

    check(spread, given, dtype, rank)
    rows = given.elements // WIDTH // given.ranks
    base, *models = map(spread, shards(rank, rows, given.models, dtype))
    out = spread(torch.zeros(rows, WIDTH, dtype=dtype))
    sent: list[int] = []
    all_reduce = distributed.all_reduce

    def counted(tensor: torch.Tensor, *args: object, **options: object) -> object:
        sent.append(tensor.nbytes)
        return all_reduce(tensor, *args, **options)

    distributed.all_reduce = counted
    seconds = []
    for repeat in range(given.repeats):
        distributed.barrier()
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        before = resident("VmRSS")
        start = time.perf_counter()
        pymerge.ties(models, base, density=DENSITY, out=out)
        seconds.append(time.perf_counter() - start)
        if repeat == 0:
            extra, told = resident("VmHWM") - before, [*sent]
    shard = rows * WIDTH * dtype.itemsize
    print(
        f"rank {rank}: {1000 * min(seconds):.0f} ms; {extra / 2**20:.1f} MiB, {extra / shard:.1%} of"
        f" one model's shard; {len(told)} collectives of {sum(told) / 1024:.0f} KiB in all",
        flush=True,
    )
    distributed.barrier()
    distributed.destroy_process_group()


def check(spread, given: argparse.Namespace, dtype: torch.dtype, rank: int) -> None:
    """The correctness gate: the shards of a small merge are those of the full one."""
    every = [shards(each, 8, given.models, dtype) for each in range(given.ranks)]
    base, *models = (torch.cat(parts) for parts in zip(*every, strict=True))
    wanted = pymerge.ties(models, base, density=DENSITY)[8 * rank : 8 * rank + 8]
    own, *others = map(spread, every[rank])
    assert torch.equal(pymerge.ties(others, own, density=DENSITY).to_local(), wanted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--elements", type=int, default=1 << 27)
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of all ranks")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        torch.multiprocessing.spawn(run, (store, given), given.ranks)
    torch.set_num_threads(given.threads)
    rows = given.elements // WIDTH
    base, *models = shards(0, rows, given.models, getattr(torch, given.dtype))
    out = torch.zeros_like(base)
    seconds = []
    for _ in range(given.repeats):
        start = time.perf_counter()
        pymerge.ties(models, base, density=DENSITY, out=out)
        seconds.append(time.perf_counter() - start)
    print(f"one process, the full tensors: {1000 * min(seconds):.0f} ms")


if __name__ == "__main__":
    main()
