"""Folders whose models name tensors differently, or do not have the same ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from folder_cases import State, assert_same, family, read_result, recipe, write_model

import pymerge
from pymerge.engine.merge import merge_checkpoints
from pymerge.errors import MismatchError


def write(root: Path, states: list[State]) -> list[Path]:
    return [write_model(root / str(k), state) for k, state in enumerate(states)]


@pytest.mark.parametrize("method", ["ties", "task_arithmetic", "dare_ties"])
def test_the_result_is_that_of_models_whose_names_and_parts_agree(
    tmp_path: Path, method: str
) -> None:
    base, one, two = family()
    parameters = {} if method == "task_arithmetic" else {"density": 0.5}
    folders = write(tmp_path / "plain", [base, one, two])
    merge_checkpoints(recipe(method, folders, **parameters), tmp_path / "wanted")
    extra = {"mtp.fc.weight": torch.ones(2, 2, dtype=torch.bfloat16)}
    wrapped = {f"_orig_mod.{name}": tensor for name, tensor in one.items()}
    head = {"v_head.summary.weight": torch.ones(1, 16, dtype=torch.bfloat16)}
    folders = write(tmp_path / "other", [base | extra, wrapped, two | head])
    config = recipe(method, folders, **parameters)
    summary = merge_checkpoints(config, tmp_path / "out")
    assert_same(read_result(tmp_path / "out"), read_result(tmp_path / "wanted") | extra)
    assert len(summary.notes) == 3
    with pytest.raises(MismatchError, match="strict=True asks for the same tensors"):
        merge_checkpoints(config, tmp_path / "strict", strict=True)
    with pytest.raises(MismatchError, match="strict=True asks for the same tensors"):
        pymerge.merge([one, two | head], base | extra, strict=True)


def test_variances_stay_positive(tmp_path: Path) -> None:
    one, two = 0.01, 0.03
    folders = [
        write_model(tmp_path / str(k), {"bn.running_var": torch.full((3,), value)})
        for k, value in enumerate((1.0, one, two))
    ]
    merge_checkpoints(recipe("task_arithmetic", folders), tmp_path / "out")
    found = read_result(tmp_path / "out")["bn.running_var"]
    assert torch.equal(found, (torch.full((3,), one) + torch.full((3,), two)) / 2)


HEAD, TOKENS = "lm_head.weight", "model.embed_tokens.weight"


def tied(state: State, name: str) -> State:
    """With the embedding as another tensor, under a name that says nothing of it."""
    return state | {name: state[TOKENS]}


@pytest.mark.parametrize("door", ["dict", "bin"])
def test_what_is_one_memory_in_the_base_stays_so(tmp_path: Path, door: str) -> None:
    """Of a tied copy that a model was saved without, the tensor itself is merged, not the base's
    copy: loaded in the order of the dict, that would replace what was merged.
    """
    base, one, two = family(dtype=torch.float32)
    base, one = tied(base, "decoder.weight"), tied(one, "decoder.weight")
    if door == "dict":
        with pytest.warns(UserWarning, match=r"models\[1\] has no decoder\.weight; its tied"):
            made = pymerge.merge([one, two], base, method="task_arithmetic", weight=0.5)
        assert made["decoder.weight"].data_ptr() == made[TOKENS].data_ptr()
    else:
        folders = []
        for k, state in enumerate((base, one, two)):
            folders.append(write_model(tmp_path / str(k), {}))
            (folders[k] / "model.safetensors").unlink()
            torch.save(state, folders[k] / "pytorch_model.bin")
        merge_checkpoints(recipe("task_arithmetic", folders), tmp_path / "out")
        made = read_result(tmp_path / "out")
    assert torch.equal(made["decoder.weight"], made[TOKENS])
    assert not torch.equal(made[TOKENS], base[TOKENS])


def test_both_doors_ask_whether_an_output_layer_is_the_embedding(tmp_path: Path) -> None:
    """A state dict has no config: its own output layer, of other values, says it."""
    base, one, two = family(dtype=torch.float32)
    del one[HEAD]
    folders = write(tmp_path, [base, one, two])
    merge_checkpoints(recipe("ties", folders, density=0.5), tmp_path / "out")
    with pytest.warns(UserWarning, match=rf"base that models\[0\] lacks is copied: {HEAD}"):
        made = pymerge.merge([one, two], base, method="ties", weight=0.5, density=0.5)
    assert_same(made, read_result(tmp_path / "out"))
    assert torch.equal(made[HEAD], base[HEAD])
    base[HEAD] = base[TOKENS].clone()
    with pytest.warns(UserWarning, match=rf"its tied {TOKENS} is taken"):
        made = pymerge.merge([one, one], base, method="ties", weight=0.5, density=0.5)
    assert torch.equal(made[HEAD], made[TOKENS])


def test_wrappers_of_an_adapter_that_is_gone(tmp_path: Path) -> None:
    """peft's names around layers, with a trained head in the place of the original."""
    base, one, two = family(dtype=torch.float32)
    wrapped = {n.replace("q_proj.weight", "q_proj.base_layer.weight"): x for n, x in one.items()}
    wrapped["lm_head.original_module.weight"] = base[HEAD]
    wrapped["lm_head.modules_to_save.default.weight"] = wrapped.pop(HEAD)
    plain = pymerge.merge([one, two], base, density=0.5, weight=0.5)
    with (
        pytest.warns(UserWarning, match="are matched by known conversions of names"),
        pytest.warns(UserWarning, match=r"left out: lm_head\.original_module\.weight"),
    ):
        made = pymerge.merge([wrapped, two], base, density=0.5, weight=0.5)
    assert_same(made, plain)
    merge_checkpoints(
        recipe("ties", write(tmp_path, [base, wrapped, two]), density=0.5), tmp_path / "out"
    )
    assert_same(read_result(tmp_path / "out"), plain)


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_the_op_averages_running_statistics_too(scope: str) -> None:
    base, *models = (
        {"bn.running_var": torch.full((3,), v), "w": torch.ones(4) * v} for v in (1.0, 0.01, 0.03)
    )
    with pytest.warns(UserWarning, match=r"bn\.running_var is averaged over the models"):
        made = pymerge.ties(models, base, density=1.0, elect="none", merge="sum", scope=scope)
    assert torch.equal(
        made["bn.running_var"], (models[0]["bn.running_var"] + models[1]["bn.running_var"]) / 2
    )
    assert (made["w"] < 0).all()
    vectors = pymerge.ties(models, density=1.0)  # differences already: a sum may be of any sign
    assert torch.equal(vectors["bn.running_var"], vectors["w"][:3])
