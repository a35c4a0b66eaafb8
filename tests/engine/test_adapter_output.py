"""Adapters merged into an adapter (docs/spec/low_rank.md, L7 to L9)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_cases import MODULES, UP, Q, adapter, factors, write_adapter
from click.testing import CliRunner
from folder_cases import State, family, read_result, recipe, write_model
from safetensors.torch import load_file

from pymerge.checkpoint.adapter import open_adapter
from pymerge.cli.main import commands
from pymerge.engine.adapter_merge import approximated, compressed
from pymerge.engine.merge import merge_checkpoints, plan_checkpoints
from pymerge.engine.verify import verify_folder
from pymerge.errors import MergeError

BASE = family(0, torch.float32)[0]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base", BASE)


@pytest.fixture
def loras(tmp_path: Path) -> list[Path]:
    """Of different ranks, scales and modules."""
    other = factors({Q.format(0): (16, 16), UP.format(1): (24, 16)}, 3, 5, "base_model.model.")
    return [
        write_adapter(tmp_path / "a", adapter(1)),
        write_adapter(tmp_path / "b", other, r=3, lora_alpha=4, use_rslora=True),
    ]


def updates(folder: Path) -> State:
    """The whole update of every module, as any reader of the config has it."""
    opened = open_adapter(str(folder))
    state = load_file(folder / "adapter_model.safetensors")
    return {
        module: update.scale
        * state[update.b.info.name].double().flatten(1)
        @ state[update.a.info.name].double().flatten(1)
        for module, update in opened.updates.items()
    }


def merged(config: Any, out: Path, rank: Any, **options: Any) -> State:
    merge_checkpoints(config, out, rank=rank, **options)
    return updates(out)


def weighted(loras: list[Path], weights: list[float]) -> State:
    total: State = {}
    for folder, weight in zip(loras, weights, strict=True):
        for module, update in updates(folder).items():
            total[module] = total.get(module, torch.zeros_like(update)) + weight * update
    return total


def assert_close(found: State, wanted: State, precision: float = 1e-6) -> None:
    assert sorted(found) == sorted(wanted)
    for module, update in wanted.items():
        torch.testing.assert_close(found[module], update, rtol=0, atol=precision, msg=module)


@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
def test_the_exact_sum(tmp_path: Path, base: Path, loras: list[Path], method: str) -> None:
    """L7: no cross terms; the rank is the sum of the ranks, and alpha is the rank."""
    named = loras if method != "linear" else [Path(f"{base}+{folder}") for folder in loras]
    config = recipe(method, [base, *named])
    config["models"][1]["parameters"]["weight"] = 0.3 if method != "linear" else 0.5
    if method == "task_arithmetic":
        config["parameters"] = {"lambda": 0.9}
    weights = [0.45, 0.27] if method != "linear" else [0.5, 0.5]
    found = merged(config, tmp_path / "out", "exact")
    assert_close(found, weighted(loras, weights))
    opened = open_adapter(str(tmp_path / "out"))
    ranks = {module: update.rank for module, update in opened.updates.items()}
    assert ranks == {
        Q.format(0): 7, UP.format(1): 7, Q.format(1): 4, UP.format(0): 4,
    }  # fmt: skip
    assert all(update.scale == 1 for update in opened.updates.values())
    state = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    full = merge_checkpoints(config, tmp_path / "full")
    wanted = read_result(full.out)
    for module, update in found.items():
        name = f"{module}.weight"
        torch.testing.assert_close(
            (BASE[name].double() + update).float(), wanted[name], rtol=1e-5, atol=1e-6
        )


def test_parameters_of_single_tensors(tmp_path: Path, base: Path, loras: list[Path]) -> None:
    config = recipe("task_arithmetic", [base, *loras])
    config["models"][0]["parameters"]["weight"] = [
        {"filter": "up_proj", "value": 2.0},
        {"value": [1.0, 0.0]},
    ]
    config["models"][1]["parameters"]["weight"] = 0.0
    ours, found = updates(loras[0]), merged(config, tmp_path / "out", "exact")
    scales = {Q.format(0): 1.0, Q.format(1): 0.0, UP.format(0): 2.0, UP.format(1): 2.0}
    assert_close(found, {module: scale * ours[module] for module, scale in scales.items()})


@pytest.mark.parametrize("rank", [1, 3, 6, 99])
def test_a_lower_rank_is_the_best(tmp_path: Path, base: Path, loras: list[Path], rank: int) -> None:
    """L8: as good as a cut of the whole update's SVD, and what is lost is said."""
    config = recipe("task_arithmetic", [base, *loras])
    found = merged(config, tmp_path / "out", rank)
    wanted, lost, whole = {}, 0.0, 0.0
    for module, update in weighted(loras, [0.5, 0.5]).items():
        u, s, v = torch.linalg.svd(update, full_matrices=False)
        wanted[module] = u[:, :rank] * s[:rank] @ v[:rank]
        lost, whole = lost + float((s[rank:] ** 2).sum()), whole + float((s**2).sum())
    assert_close(found, wanted)
    for module, update in open_adapter(str(tmp_path / "out")).updates.items():
        assert update.rank == min(rank, 7 if module in (Q.format(0), UP.format(1)) else 4)
    notes = " ".join(merge_checkpoints(config, tmp_path / "again", rank=rank).notes)
    share = 100 * (lost / whole) ** 0.5
    if rank < 4:
        assert f"{share:.2g} % of the merged update was lost" in notes
    elif rank == 99:
        assert "was lost" not in notes


@pytest.mark.parametrize("method", ["ties", "dare_ties", "dare_linear", "breadcrumbs"])
def test_other_methods_merge_the_whole_updates(
    tmp_path: Path, base: Path, loras: list[Path], method: str
) -> None:
    """L9: at the full rank they are what the merge of models adds to the base."""
    config = recipe(method, [base, *loras], density=0.5)
    found = merged(config, tmp_path / "out", 16)
    result = merge_checkpoints(config, tmp_path / "full").out
    wanted = {
        module: read_result(result)[f"{module}.weight"].double() - BASE[f"{module}.weight"].double()
        for module in MODULES
    }
    differing = sum(
        int((~torch.isclose(found[m], wanted[m], rtol=1e-4, atol=1e-5)).sum()) for m in MODULES
    )
    assert differing <= 2  # entries at a threshold
    with pytest.raises(MergeError, match=r"no rank that is known .*rank=32"):
        merge_checkpoints(config, tmp_path / "no", rank="exact")


def test_weights_that_would_scale_the_base(tmp_path: Path, base: Path, loras: list[Path]) -> None:
    config = recipe("linear", [base, *(Path(f"{base}+{folder}") for folder in loras)])
    config["parameters"] = {"normalize": False}
    config["models"][0]["parameters"]["weight"] = 0.6
    with pytest.raises(MergeError, match=r"do not sum to 1 scale the\s+base"):
        merge_checkpoints(config, tmp_path / "out", rank="exact")
    config["models"][0]["parameters"]["weight"] = 0.5
    assert_close(merged(config, tmp_path / "out", "exact"), weighted(loras, [0.5, 0.5]))


def test_a_base_among_the_averaged(tmp_path: Path, base: Path, loras: list[Path]) -> None:
    config = recipe("linear", [base, base, Path(f"{base}+{loras[0]}")])
    assert_close(merged(config, tmp_path / "out", "exact"), weighted(loras[:1], [0.5]))


def test_the_folder(tmp_path: Path, base: Path, loras: list[Path]) -> None:
    """It is verified, may be a model of another merge, and may be replaced."""
    config = recipe("task_arithmetic", [base, *loras])
    out = tmp_path / "out"
    summary = merge_checkpoints(config, out, rank="exact")
    assert {path.name for path in out.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "pymerge_manifest.json",
    }  # fmt: skip
    card = (out / "README.md").read_text()
    assert "library_name: peft" in card and str(tmp_path) not in card
    settings = json.loads((out / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "base"
    assert any("an adapter of 4 modules, of rank 4 to 7" in note for note in summary.notes)
    found = verify_folder(out)
    assert found.problems == () and "the 4 updates of the adapter fit" in found.done[-1]
    again = {"merge_method": "passthrough", "models": [{"model": f"{base}+{out}"}]}
    result = read_result(merge_checkpoints(again, tmp_path / "model").out)
    wanted = read_result(merge_checkpoints(config, tmp_path / "full").out)
    for name, tensor in wanted.items():
        torch.testing.assert_close(result[name], tensor, rtol=1e-5, atol=1e-6)
    merge_checkpoints(config, out, rank=2, overwrite=True)
    (out / "adapter_model.safetensors").write_bytes(b"x")
    assert "merge again" in verify_folder(out).problems[0]
    (out / "notes.txt").write_text("mine")
    with pytest.raises(MergeError):
        merge_checkpoints(config, out, rank=2, overwrite=True)


def test_resuming_needs_the_same_rank(tmp_path: Path, base: Path, loras: list[Path]) -> None:
    config = recipe("task_arithmetic", [base, *loras])

    def stop(done: int, whole: int, name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_checkpoints(config, tmp_path / "out", rank="exact", progress=stop)
    merge_checkpoints(config, tmp_path / "out", rank="exact", resume=True)
    assert_close(updates(tmp_path / "out"), weighted(loras, [0.5, 0.5]))


def test_the_command(tmp_path: Path, base: Path, loras: list[Path]) -> None:
    (tmp_path / "r.yml").write_text(json.dumps(recipe("task_arithmetic", [base, *loras])))
    run, out = CliRunner().invoke, str(tmp_path / "out")
    made = run(commands, ["merge", str(tmp_path / "r.yml"), out, "--rank", "2", "--verify"])
    assert made.exit_code == 0, made.output
    assert "of rank 2" in made.output and "fit its adapter_config.json" in made.output
    dry = run(
        commands, ["merge", str(tmp_path / "r.yml"), f"{out}2", "--rank", "exact", "--dry-run"]
    )
    assert dry.exit_code == 0 and "of rank 4 to 7" in dry.output
    for bad in ("0", "-1", "half", "99999999999"):
        made = run(commands, ["merge", str(tmp_path / "r.yml"), out, "--rank", bad])
        assert made.exit_code == 2
        assert f"'--rank': {bad!r} is neither 'exact' nor a whole number" in made.output.replace(
            f": {bad} is", f": {bad!r} is"
        )


def test_ranks_that_are_none(tmp_path: Path, base: Path, loras: list[Path]) -> None:
    config = recipe("task_arithmetic", [base, *loras])
    for bad in (True, 2.0, [1]):
        with pytest.raises(TypeError, match="pass 'exact', or a whole number"):
            merge_checkpoints(config, tmp_path / "out", rank=bad)  # type: ignore[arg-type]
    for wrong in (0, "all"):
        with pytest.raises(ValueError, match="neither 'exact' nor"):
            merge_checkpoints(config, tmp_path / "out", rank=wrong)


def test_what_no_adapter_can_be(tmp_path: Path, base: Path, loras: list[Path]) -> None:
    def refused(words: str, *models: Any, **more: Any) -> None:
        config = recipe("task_arithmetic", [base, *models]) | more
        assert plan_checkpoints(config).problems == ()
        with pytest.raises(MergeError, match=f"(?s){words}"):
            merge_checkpoints(config, tmp_path / "out", rank="exact")

    other = write_model(tmp_path / "other", {n: t + 1 for n, t in BASE.items()})
    refused("other is none of", loras[0], other)
    refused(r"other\+.* is none of", loras[0], Path(f"{other}+{loras[1]}"))
    magnitudes = adapter() | {
        f"base_model.model.{module}.lora_magnitude_vector": torch.ones(size[0])
        for module, size in MODULES.items()
    }
    dora = write_adapter(tmp_path / "dora", magnitudes, use_dora=True)
    refused("has DoRA's magnitudes", loras[0], dora)
    piece = {"layer_range": [0, 1], "model": f"{base}+{loras[0]}", "parameters": {"weight": 1}}
    config = {"merge_method": "linear", "slices": [{"sources": [piece]}]}
    with pytest.raises(MergeError, match="has the layers of its base; remove the slices"):
        merge_checkpoints(config, tmp_path / "out", rank="exact")
    paper = recipe("ties", [base, *loras], flavor="paper", density=0.5)
    with pytest.raises(MergeError, match="thresholds of single tensors"):
        merge_checkpoints(paper, tmp_path / "out", rank=4)
    with pytest.raises(MergeError, match="peft loads one alone"):
        both = recipe("task_arithmetic", [base, *loras])
        merge_checkpoints(both, tmp_path / "out", rank=4, out_shard_size=1000)


def test_saved_modules_are_merged_whole(tmp_path: Path, base: Path) -> None:
    """They are in the adapter as the method merges them, with the base's where an adapter has none."""
    states = [adapter(1), adapter(2)]
    states[0]["base_model.model.lm_head.weight"] = BASE["lm_head.weight"] + 1
    own = [write_adapter(tmp_path / f"a{k}", state) for k, state in enumerate(states)]
    config = recipe("task_arithmetic", [base, *own])
    merge_checkpoints(config, tmp_path / "out", rank="exact")
    state = load_file(tmp_path / "out" / "adapter_model.safetensors")
    torch.testing.assert_close(
        state["base_model.model.lm_head.weight"], BASE["lm_head.weight"] + 0.5
    )
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["modules_to_save"] == ["lm_head"]


def test_factors_that_are_not_finite(tmp_path: Path, base: Path, loras: list[Path]) -> None:
    state = adapter()
    next(iter(state.values()))[0, 0] = torch.nan
    bad = write_adapter(tmp_path / "bad", state)
    with pytest.raises(MergeError, match=r"factors of model.layers.0.* are NaN or infinite"):
        merge_checkpoints(
            recipe("task_arithmetic", [base, loras[0], bad]), tmp_path / "o", rank="exact"
        )
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(("rows", "columns"), [(60, 40), (40, 60), (5, 300)])
@pytest.mark.parametrize("rank", [1, 4, 30])
def test_approximations_are_nearly_the_best(rows: int, columns: int, rank: int) -> None:
    """L9, of updates without any gap among their directions: the hardest there are."""
    update = np.random.default_rng(rows).standard_normal((rows, columns)).astype(np.float32)
    sizes = np.linalg.svd(update, compute_uv=False).astype(np.float64)
    best = float(np.square(sizes[rank:]).sum())
    b, a, lost, whole = approximated(update, rank)
    assert b.shape == (rows, min(rank, rows)) and a.shape == (min(rank, rows), columns)
    error = float(np.square(update - b @ a).sum())
    assert best * (1 - 1e-5) - 1e-8 <= error <= best * 1.02 + 1e-6
    assert abs(lost - error) <= 1e-4 * whole and abs(whole - np.square(sizes).sum()) < 1e-3 * whole


def test_compression_takes_no_whole_matrix() -> None:
    """L8, of a product that would have 10^12 elements."""
    draw = np.random.default_rng(0)
    b, a = draw.standard_normal((1_000_000, 3)), draw.standard_normal((3, 1_000_000))
    left, right, lost, whole = compressed(b, a, 2)
    assert left.shape == (1_000_000, 2) and right.shape == (2, 1_000_000) and 0 < lost < whole
