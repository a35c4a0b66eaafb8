"""Checkpoints as two processes of torch.distributed save them. Run as a script by each process:
RANK FOLDER.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

SEED = 5


class Small(nn.Module):
    """Rows that two processes cannot share evenly, and a tensor with rows for one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 11)
        self.norm = nn.LayerNorm(11)
        self.one = nn.Linear(11, 1)
        self.scale = nn.Parameter(torch.ones(3, 4, 5))


def full_state() -> dict[str, torch.Tensor]:
    """What the processes save between them."""
    generator = torch.Generator().manual_seed(SEED)
    return {
        name: torch.randn(tensor.shape, generator=generator)
        for name, tensor in Small().state_dict().items()
    }


def save(rank: int, folder: Path) -> None:
    """`fsdp`: model and optimizer of FSDP2; `columns`: cut along other axes; `safetensors`: each
    process's own files of HuggingFaceStorageWriter.
    """
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2
    )
    mesh = init_device_mesh("cpu", (2,))
    model = Small()
    model.load_state_dict(full_state())
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"app": {"model": weights, "optim": state}, "step": 7}, checkpoint_id=folder / "fsdp")
    writer = dcp.HuggingFaceStorageWriter(str(folder / "safetensors"), save_distributed=True)
    dcp.save(dict(weights), storage_writer=writer)
    axes = {"up.weight": 1, "scale": 2}
    columns = {
        name: distribute_tensor(tensor, mesh, [Shard(axes.get(name, 0))])
        for name, tensor in full_state().items()
    }
    dcp.save(columns, checkpoint_id=folder / "columns")
    dist.destroy_process_group()


if __name__ == "__main__":
    save(int(sys.argv[1]), Path(sys.argv[2]))
