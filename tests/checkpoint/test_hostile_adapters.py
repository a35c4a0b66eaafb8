"""Damaged and hostile adapters: an answer or an error that names the file, and nothing lost in
silence.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import MODULES, UP, Q, adapter, factors, write_adapter
from click.testing import CliRunner
from folder_cases import State, family, read_result, recipe, write_model
from mutations import mutated
from safetensors.torch import save_file

from pymerge.checkpoint.adapter import open_adapter
from pymerge.checkpoint.patterns import by_pattern
from pymerge.cli.main import commands
from pymerge.engine.adapter_merge import approximated
from pymerge.engine.merge import merge_checkpoints, plan_checkpoints
from pymerge.errors import CheckpointError, MergeError, MismatchError, NonFiniteError

PREFIX = "base_model.model."
FIRST = f"{PREFIX}{Q.format(0)}"
SETTINGS = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "rank_pattern": {"q_proj": 4, r"^model\.layers\.0\..*up_proj": 4},
    "alpha_pattern": {"up_proj": 8},
    "base_model_name_or_path": "some/base",
    "revision": "main",
    "modules_to_save": ["lm_head"],
    "init_lora_weights": True,
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base", family(0, torch.float32)[0])


def passthrough(base: Path, folder: Path) -> dict[str, Any]:
    return {"merge_method": "passthrough", "models": [{"model": f"{base}+{folder}"}]}


def some(document: Any, every: int) -> list[tuple[str, bytes]]:
    """Each of so many mutations."""
    return list(mutated(document))[::every]


def check_answer(config: Any, tmp_path: Path, options: list[str]) -> None:
    (tmp_path / "r.yml").write_text(json.dumps(config))
    words = ["merge", str(tmp_path / "r.yml"), str(tmp_path / "out"), "--overwrite", *options]
    result = CliRunner().invoke(commands, words)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0 or (result.exit_code == 1 and "error: " in result.output)
    assert "Warning" not in result.output


@pytest.mark.parametrize("options", [[], ["--rank", "3"]], ids=str)
def test_any_value_of_the_config(tmp_path: Path, base: Path, options: list[str]) -> None:
    folder = write_adapter(tmp_path / "a", adapter(1))
    config = recipe("task_arithmetic", [base, folder, write_adapter(tmp_path / "b", adapter(2))])
    for _, content in some(SETTINGS, 9):
        (folder / "adapter_config.json").write_bytes(content)
        check_answer(config, tmp_path, options)


@pytest.mark.parametrize("options", [[], ["--rank", "3"]], ids=str)
def test_any_entry_of_the_header(tmp_path: Path, base: Path, options: list[str]) -> None:
    folder = write_adapter(tmp_path / "a", adapter(1))
    config = recipe("ties", [base, folder, write_adapter(tmp_path / "b", adapter(2))], density=0.5)
    path = folder / "adapter_model.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    for _, content in some(json.loads(whole[8 : 8 + length]), 19):
        path.write_bytes(len(content).to_bytes(8, "little") + content + whole[8 + length :])
        check_answer(config, tmp_path, options)


# Patterns.


@pytest.mark.parametrize(
    "pattern",
    [
        r"(.*)*x",
        r"(\w+\.?)+x",
        r"((a|b){9}){9}x",
        r"(?:.+)+",
        r"(?:.?){60}x",
        r".*.*.*.*.*x",
        r".?" * 40 + "x",
        r"(l|la)" * 30,
        r"(?x:(.*)*[ # ]\n)x",
        r"(?=(.*)*x)",
        r"[^]](.*)*x",
        r"\((.*)*x",
    ],
)
def test_patterns_whose_search_may_never_end(tmp_path: Path, base: Path, pattern: str) -> None:
    re.compile(pattern)
    for key, value in (("rank_pattern", 4), ("alpha_pattern", 8)):
        folder = write_adapter(tmp_path / key, adapter(), **{key: {pattern: value}})
        with pytest.raises(CheckpointError, match=rf"{key} .* search may never end"):
            open_adapter(str(folder))


@pytest.mark.parametrize("pattern", ["(?i)q_proj", "x)(", "[", "x{9}{9}", "a" * 1001])
def test_what_is_no_pattern_inside_of_another(tmp_path: Path, pattern: str) -> None:
    folder = write_adapter(tmp_path / "a", adapter(), rank_pattern={pattern: 4})
    with pytest.raises(CheckpointError, match=r"is no pattern \(.*\); download it again"):
        open_adapter(str(folder))


NAMES = [Q.format(0), UP.format(11), "q_proj", "xq_proj", "model.layers.0.self_attn", "lm_head"]


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        "model.layers.0.self_attn.q_proj",
        r"^model\.layers\.0\..*",
        r"layers\.(?:[0-4]|1[0-2])\..*\.(q|k|v|up)_proj",
        r"layers\.\d+\.mlp\.\w+",
        r"self_attn.q_pro[^k]?j",
        r"l{1}m_head|q_proj",
        r".*_proj",
    ],
)
def test_patterns_mean_what_they_do_in_peft(pattern: str) -> None:
    found = by_pattern({pattern: 3, "lm_head": 5})
    for name in NAMES:
        wanted = 3 if re.match(rf"(.*\.)?({pattern})$", name) else 5 if name == "lm_head" else 7
        assert found.of(name, 7) == wanted


def test_long_names_and_many_patterns(tmp_path: Path) -> None:
    module = "a" * 129
    folder = write_adapter(tmp_path / "a", factors({module: (4, 4)}), rank_pattern={module: 4})
    assert open_adapter(str(folder)).updates[module].rank == 4
    folder = write_adapter(tmp_path / "b", factors({module: (4, 4)}), rank_pattern={".*": 4})
    with pytest.raises(CheckpointError, match="a name of 129 characters is too long"):
        open_adapter(str(folder))
    many = {f"m{i}": 4 for i in range(10_001)}
    folder = write_adapter(tmp_path / "c", adapter(), alpha_pattern=many)
    with pytest.raises(CheckpointError, match="alpha_pattern has more than 10000 patterns"):
        open_adapter(str(folder))


# Numbers and names that nothing holds.


@pytest.mark.parametrize("key", ["lora_alpha", "alpha_pattern"])
def test_numbers_beyond_all_floats(tmp_path: Path, key: str) -> None:
    value: Any = 10**400 if key == "lora_alpha" else {"q_proj": -(10**400)}
    folder = write_adapter(tmp_path / "a", adapter(), **{key: value})
    with pytest.raises(CheckpointError, match=rf"{key}.* is '-?10+', not a finite number"):
        open_adapter(str(folder))


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 300, "a\0b", "~nobody/x", "\ud800"])
def test_names_that_no_base_can_have(tmp_path: Path, name: str) -> None:
    folder = write_adapter(tmp_path / "a", adapter(), base_model_name_or_path=name)
    with pytest.raises(CheckpointError, match=r"the base of the adapter .*, by its config"):
        plan_checkpoints({"merge_method": "passthrough", "models": [{"model": str(folder)}]})


def test_a_name_of_a_base_without_end(tmp_path: Path) -> None:
    for key in ("base_model_name_or_path", "revision"):
        settings = {"base_model_name_or_path": "x", key: "y" * 2000}
        folder = write_adapter(tmp_path / key, adapter(), **settings)
        with pytest.raises(CheckpointError, match=r"base_model_name_or_path has 200. characters"):
            open_adapter(str(folder))


# Several tensors for one.


def test_a_trained_copy_counts_wherever_it_stands(tmp_path: Path, base: Path) -> None:
    """peft saves resized embeddings, and biases with `bias="all"`, beside the copies of them that
    were trained.
    """
    trained, before = torch.full((16,), 2.0), torch.full((16,), 3.0)
    pair = {"model.norm.modules_to_save.weight": trained, "model.norm.weight": before}
    for k, names in enumerate((list(pair), list(pair)[::-1])):
        folder = write_adapter(tmp_path / str(k), adapter())
        state = {PREFIX + name: pair[name] for name in names} | adapter()
        (folder / "adapter_model.safetensors").unlink()
        torch.save(state, folder / "adapter_model.bin")
        merge_checkpoints(passthrough(base, folder), tmp_path / f"out{k}")
        assert torch.equal(read_result(tmp_path / f"out{k}")["model.norm.weight"], trained)


@pytest.mark.parametrize(
    "names",
    [
        (f"{PREFIX}model.norm.weight", "model.norm.weight"),
        (f"{PREFIX}model.norm.base_layer.weight", f"{PREFIX}model.norm.weight"),
        (
            f"{PREFIX}model.norm.modules_to_save.one.weight",
            f"{PREFIX}model.norm.modules_to_save.two.weight",
        ),
        (f"{FIRST}.lora_A.other.weight", f"{FIRST}.lora_A.weight"),
        (f"{FIRST}.lora_down.weight", f"{FIRST}.lora_A.weight"),
    ],
)
def test_two_tensors_for_one(tmp_path: Path, names: tuple[str, str]) -> None:
    state = adapter() | {name: torch.ones(4, 16) for name in names}
    folder = write_adapter(tmp_path / "a", state)
    with pytest.raises(CheckpointError, match="holds several adapters"):
        open_adapter(str(folder))


def kohya(*modules: str) -> State:
    state: State = {}
    for module in modules:
        state[f"{module}.lora_down.weight"] = torch.ones(2, 16)
        state[f"{module}.lora_up.weight"] = torch.ones(16, 2)
        state[f"{module}.alpha"] = torch.tensor(1.0)
    return state


def test_two_alphas_of_one_module(tmp_path: Path) -> None:
    state = kohya("lora_unet_q") | {f"{PREFIX}lora_unet_q.alpha": torch.tensor(2.0)}
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"holds several adapters \(.*\.alpha\)"):
        open_adapter(str(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("rank", [None, "exact", 2])
def test_two_models_of_one_file_for_one_tensor(tmp_path: Path, rank: Any) -> None:
    base = write_model(tmp_path / "unet", {"q.weight": torch.zeros(16, 16)}, {})
    save_file(kohya("lora_te1_q", "lora_te2_q"), tmp_path / "x.safetensors")
    config = recipe("task_arithmetic", [base, tmp_path / "x.safetensors"])
    with pytest.raises((MismatchError, CheckpointError), match=r"several updates of q\.weight"):
        merge_checkpoints(config, tmp_path / "out", rank=rank)


# Values.


def dora(shape: tuple[int, ...]) -> State:
    state = adapter()
    for module, (outputs, _) in MODULES.items():
        state[f"{PREFIX}{module}.lora_magnitude_vector"] = torch.ones(outputs)
    state[f"{FIRST}.lora_magnitude_vector"] = torch.ones(shape)
    return state


@pytest.mark.parametrize("shape", [(), (1,), (7,), (0,), (17,), (4, 16)], ids=str)
def test_magnitudes_of_other_shapes(tmp_path: Path, base: Path, shape: tuple[int, ...]) -> None:
    folder = write_adapter(tmp_path / "a", dora(shape), use_dora=True)
    said = rf"q_proj.weight has 16 outputs and the update's magnitudes are \[{str(shape)[1:3]}"
    with pytest.raises(MergeError, match=said.rstrip(",)")):
        plan_checkpoints(passthrough(base, folder))


def test_a_row_without_length(tmp_path: Path) -> None:
    """DoRA divides by its norm."""
    state = family(0, torch.float32)[0]
    state[f"{Q.format(0)}.weight"][3] = 0
    base = write_model(tmp_path / "base", state)
    update = dora((16,))
    update[f"{FIRST}.lora_B.weight"][3] = 0
    folder = write_adapter(tmp_path / "a", update, use_dora=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(NonFiniteError, match=r"q_proj.weight holds NaN .*: 16 in"):
            merge_checkpoints(passthrough(base, folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def nan(state: State) -> None:
    state[f"{FIRST}.lora_A.weight"][0, 0] = math.nan


def infinite(state: State) -> None:
    state[f"{FIRST}.lora_B.weight"][1, 1] = math.inf


def too_large(state: State) -> None:
    for which in "AB":
        name = f"{FIRST}.lora_{which}.weight"
        state[name] = torch.full(state[name].shape, 1e300, dtype=torch.float64)


@pytest.mark.parametrize(
    ("method", "rank"),
    [
        ("task_arithmetic", "exact"),
        ("task_arithmetic", 3),
        ("task_arithmetic", 99),
        ("ties", 3),
        ("ties", 99),
    ],
)
@pytest.mark.parametrize("damage", [nan, infinite, too_large])
def test_factors_that_are_not_finite(
    tmp_path: Path, base: Path, damage: Callable[[State], None], method: str, rank: Any
) -> None:
    state = adapter(1)
    damage(state)
    folders = [write_adapter(tmp_path / "a", state), write_adapter(tmp_path / "b", adapter(2))]
    config = recipe(method, [base, *folders], **({"density": 0.5} if method == "ties" else {}))
    said = "overflow float32" if damage is too_large else rf"are NaN or infinite in {folders[0]};"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(NonFiniteError, match=f"the factors of {Q.format(0)} {said}"):
            merge_checkpoints(config, tmp_path / "out", rank=rank)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [1.0, 2.0**-140, 2.0**-60, 2.0**90, 2.0**126])
def test_updates_of_any_size_are_approximated(size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(24, 16, generator=generator)
    plain /= plain.abs().max()
    b, a, lost, whole = approximated((plain * size).numpy(), 16)
    found = torch.from_numpy(b) @ torch.from_numpy(a)
    precision = max(1e-5, 2.0**-149 / size * 4)
    torch.testing.assert_close(found / size, plain.double(), rtol=0, atol=precision)
    assert whole == pytest.approx(size**2 * float(plain.double().square().sum()), rel=1e-2)
    assert lost <= whole * precision
