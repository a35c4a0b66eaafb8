"""The state dict in what a training loop saved, from files and in Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from folder_cases import State, assert_same, read_result

import pymerge
from pymerge.checkpoint.reader import open_model
from pymerge.engine.merge import merge_checkpoints
from pymerge.errors import CheckpointError


def model(seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(3, 2, generator=generator),
        "b": torch.randn(1, generator=generator),
        "steps": torch.tensor(seed),
    }


def trained(seed: int = 0) -> tuple[torch.nn.Module, dict[str, Any]]:
    torch.manual_seed(seed)
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(3)).sum().backward()
    optimizer.step()
    return net, optimizer.state_dict()


def tutorial(state: State) -> Any:
    """As PyTorch's tutorial on general checkpoints writes it, the optimizer's state included."""
    _, optimizer = trained()
    loss = {"epoch": 4, "loss": torch.tensor(0.5)}
    return {"optimizer_state_dict": optimizer, "model_state_dict": state, **loss}


# What the model's tensors lie in.
SAVED = {
    "flat": lambda s: s,
    "tutorial": tutorial,
    "lightning": lambda s: {"epoch": 1, "state_dict": s, "optimizer_states": [trained()[1]]},
    "deepspeed": lambda s: {"module": s, "global_steps": 3, "client_lr_scheduler": {"x": 1}},
    "basicsr": lambda s: {"params": s},
    "two levels": lambda s: {"checkpoint": {"model": s, "rng": torch.ones(9)}, "args": {"lr": 1}},
    "known in known": lambda s: {"model": {"state_dict": s}},
    "random state beside": lambda s: {"model": s, "rng_state": torch.arange(99).to(torch.uint8)},
    "moments by name": lambda s: {"optimizer": {"exp_avg": s}, "policy": s},
    "history beside": lambda s: {"net": s, "history": {"loss": torch.ones(100)}},
    "losses beside": lambda s: {"agent": s, "losses": torch.ones(100)},
}


@pytest.mark.parametrize("what", SAVED)
@pytest.mark.parametrize("suffix", [".pt", ".ckpt"])
def test_the_model_is_found(tmp_path: Path, what: str, suffix: str) -> None:
    files = [tmp_path / f"{k}{suffix}" for k in range(2)]
    for seed, file in enumerate(files):
        torch.save(SAVED[what](model(seed)), file)
    models = [{"model": str(file), "parameters": {"weight": 0.5}} for file in files]
    summary = merge_checkpoints({"merge_method": "linear", "models": models}, tmp_path / "out")
    wanted = pymerge.merge([model(0), model(1)], method="linear", weight=0.5)
    assert_same(read_result(tmp_path / "out"), wanted)
    assert not any("left out" in note for note in summary.notes)


@pytest.mark.parametrize("what", SAVED)
@pytest.mark.filterwarnings("ignore:tensor 'steps'")
def test_the_model_is_found_in_python(what: str) -> None:
    wanted = pymerge.merge([model(1), model(2)], model(0), method="ties")
    given = [SAVED[what](model(k)) for k in range(3)]
    assert_same(pymerge.merge(given[1:], given[0], method="ties"), wanted)


def test_averages_beside_the_weights_are_left_out_with_a_note(tmp_path: Path) -> None:
    content = {"ema": model(1), "model": model(0), "optimizer": {"exp_avg": model(2)}}
    torch.save(content, tmp_path / "m.pt")
    opened = open_model(str(tmp_path / "m.pt"))
    assert opened.notes == (
        f"{tmp_path / 'm.pt'}: the model is taken from 'model'; 'ema' beside it holds tensors too"
        " and is left out",
    )
    with pytest.warns(UserWarning, match=r"models\[0\]: the model is taken from 'model'; 'ema'"):
        merged = pymerge.merge([content], method="passthrough")
    assert_same(merged, model(0))
    del content["model"]
    torch.save(content, tmp_path / "m.pt")
    assert open_model(str(tmp_path / "m.pt")).notes == ()


# What holds no model, or more than one, and what is said of it.
NONE: dict[str, tuple[Any, str]] = {
    "a number": ({"step": torch.tensor(7)}, "no tensors of a model, by the keys 'step'; save"),
    "a loss": (
        {"loss": torch.tensor(0.5), "epoch": 3, "optimizer": trained()[1]},
        "no tensors of a model, by the keys 'loss', 'epoch', 'optimizer'; save",
    ),
    "losses": (
        {"losses": torch.ones(100), "optimizer": trained()[1]},
        "no tensors of a model, by the keys 'losses', 'optimizer'; save",
    ),
    "numbers in a model": (
        {"model": {"scale": torch.tensor(1.0)}, "x": {"loss": torch.tensor(1.0)}},
        "no tensors of a model, by the keys 'model', 'x'",
    ),
    "several": (
        {"generator": model(), "discriminator": model(1)},
        "by several keys, 'generator', 'discriminator'; save a flat state dict",
    ),
    "too deep": ({"a": {"b": {"c": model()}}}, "no tensors of a model, by the keys 'a'; save"),
    "empty": ({}, "holds no tensors: the mapping is empty"),
    "beside": ({"model": model(), "head.weight": torch.ones(2)}, "beside its 'model' .'head.weigh"),
}


@pytest.mark.parametrize("what", NONE)
def test_the_keys_that_were_found_are_named(tmp_path: Path, what: str) -> None:
    content, said = NONE[what]
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=rf"m\.pt: .*{said}"):
        open_model(str(tmp_path / "m.pt"))
    if any(isinstance(value, dict) for value in content.values()):
        with pytest.raises(ValueError, match=rf"base .*{said}"):
            pymerge.merge([model()], content, method="ties")


def test_a_mapping_that_holds_itself(tmp_path: Path) -> None:
    content: dict[str, Any] = {"w": torch.ones(2)}
    content["again"] = content
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="by names of text"):
        open_model(str(tmp_path / "m.pt"))


@pytest.mark.parametrize("key", [0, 10**5000, b"w", ("w", 1), None], ids=type)
def test_names_are_text(key: Any) -> None:
    for state in ({key: torch.ones(4)}, model() | {key: torch.ones(4)}):
        with pytest.raises(TypeError, match=r"models\[1\] has a key that is an? \w+; the names of"):
            pymerge.merge([model(), state], method="linear", weight=0.5)
