"""`merge_method: mats | regmean | fisher` over folders: against `merge_with_statistics`, the plan,
errors, resuming, memory.
"""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import statistics_cases
import torch
from folder_cases import family, merge_in, read_result, write_family, write_model, write_sharded
from mats_cases import relative
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from solve_cases import recipe, write_statistics

import pymerge
from pymerge import statistics
from pymerge.cli.terminal import summary_table
from pymerge.engine.merge import merge_checkpoints, plan_checkpoints
from pymerge.engine.sizes import Sizes
from pymerge.engine.state_dict_statistics import merge_with_statistics
from pymerge.errors import CheckpointError, ConfigError, MismatchError, NonFiniteError, OutputError
from pymerge.recipe.resolve import read_recipe
from pymerge.statistics import load

KINDS = ("input_gram", "output_grad_gram", "diagonal_fisher")


@pytest.fixture
def models(tmp_path: Path) -> tuple[list[Path], list[Path], list[dict[str, torch.Tensor]]]:
    """Folders base, m1, m2 in fp32, the statistics files of the latter two, and the states."""
    folders = write_family(tmp_path, dtype=torch.float32)
    states = family(dtype=torch.float32)
    files = [write_statistics(tmp_path / f"{k}.stats", states[k], k, kinds=KINDS) for k in (1, 2)]
    return folders, files, states


def problem(config: Any) -> str:
    plan = plan_checkpoints(config)
    assert len(plan.problems) == 1, plan.problems
    return plan.problems[0]


@pytest.mark.parametrize(
    ("method", "parameters", "options"),
    [
        ("mats", {}, {}),
        ("mats", {"iterations": 2, "damping": 0.1, "init": "task_arithmetic", "lambda": 0.4},
         {"iterations": 2, "damping": 0.1, "init": "task_arithmetic", "init_options": {"scaling": 0.4}}),
        ("mats", {"flavor": "paper", "iterations": 7, "init": "pretrained", "task_weights": "trace"},
         {"flavor": "paper", "iterations": 7, "init": "pretrained", "task_weights": "trace"}),
        ("mats", {"init": "ties", "density": 0.5, "off_diagonal": 0.9, "step_limit": 0.5},
         {"init": "ties", "init_options": {"density": [0.5, 0.5], "scaling": 1.0}, "off_diagonal": 0.9, "step_limit": 0.5}),
        ("mats", {"init": "zero", "precision": "bf16x3", "output_grams": False},
         {"init": "zero", "precision": "bf16x3", "output_grams": False}),
        ("mats", {"solver": "exact"}, {"solver": "exact"}),
        ("regmean", {"off_diagonal": 0.9}, {"off_diagonal": 0.9}),
        ("regmean", {"init": "ties"}, {"init": "ties", "init_options": {"density": [0.2, 0.2], "scaling": 1.0}}),
        ("fisher", {"minimum": 1e-8}, {"minimum": 1e-8}),
        ("fisher", {"init": "pretrained"}, {"init": "pretrained"}),
        ("fisher", {"task_weights": "trace"}, {"task_weights": "trace"}),
        ("mats", {"iterations": 50, "objective_tolerance": 0.01},
         {"iterations": 50, "objective_tolerance": 0.01}),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "sizes", [Sizes(window=1, fisher_chunk=64), Sizes()], ids=["small", "usual"]
)
def test_folders_give_what_state_dicts_give(
    models, tmp_path, method, parameters, options, sizes
) -> None:
    folders, files, states = models
    out = tmp_path / "out"
    config = recipe(method, folders[1:], files, folders[0], **parameters)
    summary = merge_in(sizes, config, out)
    want, reports = merge_with_statistics(states[1:], states[0], files, method, **options)
    got = read_result(out)
    assert sorted(got) == sorted(want)
    for name, tensor in want.items():
        assert got[name].dtype == torch.float32
        assert relative(got[name], tensor) < 2e-6, name
    written = json.loads((out / "merge_report.json").read_text())
    assert {r["name"]: r["status"] for r in written["layers"]} == {
        r.name: r.status for r in reports
    }
    solved = sum(r.status != "no_statistics" for r in reports)
    assert summary.methods[method].solved == summary.methods[method].tensors == solved
    lines = (out / "merge_report.txt").read_text().splitlines()
    assert len(lines) == 1 + len(reports)
    assert not summary.methods[method].considered


def test_numbers_of_the_report(models, tmp_path) -> None:
    folders, files, states = models
    merge_checkpoints(recipe("mats", folders[1:], files), tmp_path / "out")
    _, reports = merge_with_statistics(states[1:], None, files)
    written = json.loads((tmp_path / "out/merge_report.json").read_text())
    rows = {row["name"]: row for row in written["layers"]}
    for want in reports:
        got = rows[want.name]
        for key in ("residual_start", "residual_exit", "objective_decrease", "damping", "step"):
            value = getattr(want, key)
            assert (
                got[key] is None if value != value else got[key] == pytest.approx(value, rel=1e-3)
            )
        assert got["trace_shares"] == pytest.approx(list(want.trace_shares), rel=1e-5)


def test_output_dtype_is_rounded_once(tmp_path) -> None:
    folders = write_family(tmp_path)
    states = family()
    files = [write_statistics(tmp_path / f"{k}.stats", states[k], k) for k in (1, 2)]
    wide = [{name: t.float() for name, t in state.items()} for state in states]
    want, _ = merge_with_statistics(wide[1:], None, files)
    for dtype in (torch.float32, torch.bfloat16):
        out = tmp_path / str(dtype)
        config = recipe("mats", folders[1:], files) | {"dtype": str(dtype).removeprefix("torch.")}
        merge_checkpoints(config, out)
        for name, tensor in read_result(out).items():
            assert tensor.dtype == dtype
            error = (tensor.float() - want[name].float()).abs()
            ulp = 2.0**-8 if dtype == torch.bfloat16 else 2e-6
            assert bool((error <= ulp * want[name].float().abs().clamp(min=1e-3)).all()), name


@pytest.mark.parametrize("method", ["mats", "fisher"])
@pytest.mark.parametrize("init", ["average", "pretrained", "task_arithmetic", "ties"])
def test_the_dtype_is_the_first_models_whatever_the_start(models, tmp_path, method, init) -> None:
    folders, files, states = models
    base = {name: t.bfloat16() for name, t in states[0].items()}
    shutil.rmtree(folders[0])
    write_model(folders[0], base)
    config = recipe(method, folders[1:], files, folders[0], init=init)
    merge_checkpoints(config, tmp_path / "out")
    got = read_result(tmp_path / "out")
    want = pymerge.merge(states[1:], base, method=method, statistics=files, init=init)
    assert {n: t.dtype for n, t in got.items()} == {n: t.dtype for n, t in want.items()}
    assert all(relative(got[n], want[n]) < 2e-6 for n in want)


def test_a_folder_may_be_the_start(models, tmp_path) -> None:
    folders, files, states = models
    start = {name: t + 0.01 for name, t in states[0].items()}
    write_model(tmp_path / "start", start)
    config = recipe("mats", folders[1:], files, init=str(tmp_path / "start"))
    merge_checkpoints(config, tmp_path / "out")
    want, _ = merge_with_statistics(states[1:], None, files, init=start)
    for name, tensor in read_result(tmp_path / "out").items():
        assert relative(tensor, want[name]) < 2e-6
        if "norm" in name:
            assert torch.equal(tensor, start[name])
    assert "init model" in {t.method for t in plan_checkpoints(config).tensors}


def test_parameters_at_every_level(models, tmp_path) -> None:
    folders, files, states = models
    config = recipe(
        "mats", folders[1:], files,
        iterations=[1, 9], damping=[{"filter": "up_proj", "value": 0.5}, {"value": 0.25}],
    )  # fmt: skip
    config["models"][1]["parameters"] = {"weight": 3, "iterations": 4}
    with pytest.warns(UserWarning, match="iterations is one value for all models"):
        read_recipe(config)
    found = {
        t.name: dict(t.solve.options.options) for t in plan_checkpoints(config).tensors if t.solve
    }
    assert {n: o["iterations"] for n, o in found.items()} == {
        f"model.layers.{i}.{part}.weight": (1, 9)[i]
        for i in (0, 1)
        for part in ("self_attn.q_proj", "mlp.up_proj")
    }
    assert found["model.layers.0.mlp.up_proj.weight"]["damping"] == 0.5
    assert found["model.layers.0.self_attn.q_proj.weight"]["damping"] == 0.25
    assert all(o["task_weights"] == (1.0, 3.0) for o in found.values())
    merge_checkpoints(config, tmp_path / "out")
    name = "model.layers.1.mlp.up_proj.weight"
    want, _ = merge_with_statistics(
        states[1:], None, files, iterations=9, damping=0.5, task_weights=[1, 3]
    )
    assert relative(read_result(tmp_path / "out")[name], want[name]) < 2e-6


def test_merge_by_name(models) -> None:
    _, files, states = models
    reports: list[Any] = []
    got = pymerge.merge(
        states[1:], states[0], method="mats", statistics=files, reports=reports, iterations=3
    )
    want, _ = merge_with_statistics(states[1:], states[0], files, iterations=3)
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert len(reports) == len(want)
    assert pymerge.merge(states[1:], method="fisher", statistics=[load(f) for f in files])
    with pytest.raises(ValueError, match="statistics is missing; regmean needs a file per model"):
        pymerge.merge(states[1:], method="regmean")
    with pytest.raises(TypeError, match="ties has no parameter 'statistics'"):
        pymerge.merge(states[1:], states[0], method="ties", statistics=files)
    with pytest.raises(TypeError, match="fisher has no option 'damping'"):
        pymerge.merge(states[1:], method="fisher", statistics=files, damping=1)


def test_plan_says_what_is_solved_and_what_is_not(models) -> None:
    folders, files, _ = models
    plan = plan_checkpoints(recipe("mats", folders[1:], files))
    assert not plan.problems
    assert sorted(t.name for t in plan.tensors if t.solve) == [
        f"model.layers.{i}.{part}.weight"
        for i in (0, 1)
        for part in ("mlp.up_proj", "self_attn.q_proj")
    ]
    assert {t.method for t in plan.tensors} == {"mats", "average"}
    assert any(
        "5 tensors (1,232 parameters) have no statistics; they become the average" in n
        for n in plan.notes
    )
    assert plan.solve_memory == sum(t.solve_memory for t in plan.tensors) > 0
    stored = sum(t.solve.nbytes for t in plan.tensors if t.solve)
    assert plan.bytes_read == 2 * sum(4 * t.elements for t in plan.tensors) + stored


def test_layers_without_any_output_gram_are_solved_by_their_inputs_alone(models, tmp_path) -> None:
    folders, files, states = models
    files = [
        write_statistics(tmp_path / f"inputs{i}", state, i, kinds=("input_gram",))
        for i, state in enumerate(states[1:], 1)
    ]
    plan = plan_checkpoints(recipe("mats", folders[1:], files))
    assert not plan.problems
    notes = [note for note in plan.notes if "output_grad_gram" in note]
    assert len(notes) == 1
    assert notes[0].startswith("no output_grad_gram in the statistics of any model: model.layers.0")
    assert notes[0].endswith("; input Grams alone decide there")


def test_a_model_without_some_statistics_leaves_the_layer_to_the_others(models, tmp_path) -> None:
    folders, files, states = models
    files[1] = write_statistics(tmp_path / "partial", states[2], 2, layers=("q_proj",))
    config = recipe("mats", folders[1:], files)
    plan = plan_checkpoints(config)
    assert not plan.problems
    assert any(
        "no input_gram in the statistics of" in n and "mlp.up_proj.weight" in n for n in plan.notes
    )
    merge_checkpoints(config, tmp_path / "out")
    want, _ = merge_with_statistics(states[1:], None, files)
    name = "model.layers.0.mlp.up_proj.weight"
    assert relative(read_result(tmp_path / "out")[name], want[name]) < 2e-6


def test_statistics_of_another_model(models, tmp_path) -> None:
    folders, files, states = models
    plan = plan_checkpoints(recipe("mats", folders[1:], files[::-1]))
    assert len(plan.problems) == 2
    assert "was not collected on" in plan.problems[0]
    assert "pymerge stats" in plan.problems[0]
    other = {f"other.{name}": t + 1 for name, t in states[1].items()}
    files[0] = write_statistics(tmp_path / "other", other, 1)
    assert "knows no tensor of" in problem(recipe("mats", folders[1:], files))
    tied = load(write_statistics(tmp_path / "own", states[1], 1)).header["layers"]
    tied["model.layers.0.self_attn.q_proj"]["weight"] = "other.weight"
    tags = {"other.weight": "float32:0123456789abcdef"}
    changed = write_statistics(
        tmp_path / "tied", states[1], 1, change={"layers": tied, "weights": tags}
    )
    text = problem(recipe("mats", folders[1:], [changed, files[1]]))
    assert "was not collected on" in text and "other.weight" in text
    small = {n: t[..., :8].contiguous() if t.dim() == 2 else t for n, t in states[1].items()}
    files[0] = write_statistics(tmp_path / "small", small, 1, change={"weights": {}})
    assert "of other shapes than the models" in problem(recipe("mats", folders[1:], files))
    files[0] = write_statistics(tmp_path / "kind", states[1], 1, kinds=("output_grad_gram",))
    assert "needs input_gram; collect it" in problem(recipe("mats", folders[1:], files))
    with pytest.raises(MismatchError, match="needs input_gram"):
        merge_checkpoints(recipe("mats", folders[1:], files), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_statistics_of_another_model_beside_state_dicts(models) -> None:
    _, files, states = models
    with pytest.raises(
        ValueError, match=r"statistics\[0\] was not collected on models\[0\].*order"
    ):
        pymerge.merge(states[1:], method="mats", statistics=files[::-1])
    with pytest.raises(ValueError, match=r"was not collected on"):
        pymerge.merge(states[1:], method="fisher", statistics=files[::-1])
    with pytest.raises(TypeError, match="is one file; pass a list"):
        pymerge.merge(states[1:], method="mats", statistics=files[0])
    with pytest.raises(TypeError, match="mats has no option 'density'; it has flavor, solver"):
        pymerge.merge(states[1:], method="mats", statistics=files, density=0.5)


def test_weights_under_other_names_are_found_by_their_values(models, tmp_path) -> None:
    """S15."""
    folders, files, states = models
    want, _ = merge_with_statistics(states[1:], None, files)
    renamed = {f"vision.{name.replace('layers', 'blocks')}": t for name, t in states[1].items()}
    files[0] = write_statistics(tmp_path / "renamed", renamed, 1)
    merge_checkpoints(recipe("mats", folders[1:], files), tmp_path / "out")
    got = read_result(tmp_path / "out")
    with pytest.warns(UserWarning, match=r"statistics\[0\] names tensors otherwise .*vision"):
        other, _ = merge_with_statistics(states[1:], None, files)
    for name, tensor in want.items():
        assert relative(got[name], tensor) < 2e-6, name
        assert relative(other[name], tensor) < 2e-6, name


def test_statistics_that_fit_no_tensor_are_an_error(models, tmp_path) -> None:
    """S15."""
    _, files, states = models
    other = {f"other.{name}": t + 1 for name, t in states[1].items()}
    files[0] = write_statistics(tmp_path / "other", other, 1)
    with pytest.raises(ValueError, match=r"statistics\[0\] knows no tensor of models\[0\].*other"):
        pymerge.merge(states[1:], method="mats", statistics=files)
    with pytest.raises(ValueError, match=r"needs diagonal_fisher"):
        nothing = write_statistics(tmp_path / "grams", states[1], 1, kinds=("input_gram",))
        pymerge.merge(states[1:], method="fisher", statistics=[nothing, files[1]])


def test_values_decide_not_dtypes(tmp_path) -> None:
    """A bf16 model is loaded in fp32 for its statistics; they are still of that model."""
    folders = write_family(tmp_path)
    wide = [{name: t.float() for name, t in state.items()} for state in family()]
    files = [write_statistics(tmp_path / f"{k}.stats", wide[k], k) for k in (1, 2)]
    assert not plan_checkpoints(recipe("mats", folders[1:], files)).problems


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-100]), "truncated"),
        (lambda p: p.write_bytes(b"x" * 200), "not a safetensors file"),
        (lambda p: p.write_bytes(p.read_bytes()[:5]), "too short"),
        (lambda p: p.write_bytes(p.read_bytes().replace(b"pymerge.statistics", b"pymerge.statistica")),
         "is not a statistics file"),
        (lambda p: p.write_bytes(p.read_bytes().replace(b'"version":"1"', b'"version":"7"')), "version 7"),
        (lambda p: p.write_bytes(p.read_bytes().replace(rb'\"aliases\"', rb'\"aliaces\"')), "damaged"),
    ],
)  # fmt: skip
def test_bad_files(models, tmp_path, damage, message) -> None:
    folders, files, _ = models
    damage(files[1])
    with pytest.raises(CheckpointError, match=message) as caught:
        merge_checkpoints(recipe("mats", folders[1:], files), tmp_path / "out")
    assert str(files[1]) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_bad_recipes(models, tmp_path) -> None:
    folders, files, _ = models
    good = recipe("mats", folders[1:], files)

    def said(config: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            plan_checkpoints(config)
        return str(caught.value)

    for change, message in (
        ({"init": "pretrained"}, "init: pretrained needs base_model"),
        ({"iterations": 2.5}, "2.5 is not a whole number"),
        ({"iterations": -1}, r"-1 is outside [0, infinity)"),
        ({"flavor": "papper"}, "did you mean 'paper'"),
        ({"solver": 3}, "pass one of cg, exact"),
        ({"task_weights": "trace", "weight": 2}, "keep one of the two"),
        ({"weight": 0}, "the weights of all models are 0; give at least one a weight above 0"),
        ({"off_diagonal": 2}, "off_diagonal: 2 is outside [0, 1]; 1 leaves the Gram matrices as"),
        ({"step_limit": 0}, "step_limit=0 is not positive"),
        ({"init": "a@b@c"}, "init: 'a@b@c'"),
        ({"dampning": 1}, "did you mean 'damping'"),
    ):
        assert message in said(good | {"parameters": change})
    with pytest.warns(UserWarning, match="minimum has no effect with merge_method mats"):
        read_recipe(good | {"parameters": {"minimum": 1}})
    bare = recipe("mats", folders[1:], files)
    del bare["models"][1]["statistics"]
    assert (
        f"{folders[2]}: statistics is missing; merge_method mats needs a file for every model:"
        f" pymerge stats {folders[2]} TEXTS" in said(bare)
    )
    bare["models"][1]["statistics"] = "nowhere.safetensors"
    assert "there is no file 'nowhere.safetensors'; write it with `pymerge stats" in said(bare)
    bare["models"][1]["statistics"] = 3
    assert "is a number; pass a file that" in said(bare)
    based = recipe("mats", folders[1:], files, folders[1])
    assert (
        f"models[0]: {folders[1]} is the base model, which initialisations are made from, not one"
        f" of the merged models; leave its statistics ({files[0]}) out" in said(based)
    )
    sources = [
        [{"model": str(f), "layer_range": r, "statistics": str(s)} for f, s in zip(folders[1:], pair, strict=True)]
        for r, pair in (([0, 1], files), ([1, 2], files[::-1]))
    ]  # fmt: skip
    twice = {"merge_method": "mats", "slices": [{"sources": each} for each in sources]}
    assert (
        f"slices[1].sources[0]: {folders[1]} has two statistics files, {files[0]} in"
        f" slices[0].sources[0] and {files[1]} here" in said(twice)
    )
    three = recipe("mats", folders, [files[0], *files], solver="exact")
    assert "takes one or two models" in " ".join(plan_checkpoints(three).problems)


def test_statistics_have_no_effect_on_other_methods(models) -> None:
    folders, files, _ = models
    config = recipe("ties", folders[1:], files, folders[0], weight=1)
    with pytest.warns(UserWarning, match="statistics has no effect with merge_method ties"):
        read_recipe(config)


def test_paths_beside_the_recipe(models, tmp_path, monkeypatch) -> None:
    (tmp_path / "recipe.yml").write_text(
        "merge_method: regmean\nmodels:\n"
        "  - {model: m1, statistics: 1.stats}\n  - {model: m2, statistics: 2.stats}\n"
    )
    monkeypatch.chdir(tmp_path.parent)
    merge_checkpoints(tmp_path / "recipe.yml", tmp_path / "out")
    assert (tmp_path / "out/merge_report.json").exists()


def test_not_finite(models, tmp_path) -> None:
    folders, files, states = models
    name = "model.layers.0.mlp.up_proj.weight"
    sick = {n: t.clone() for n, t in states[2].items()}
    sick[name][-1, 3] = torch.nan
    shutil.rmtree(folders[2])
    write_model(folders[2], sick)
    config = recipe("mats", folders[1:], files)
    with pytest.raises(
        NonFiniteError, match=r"up_proj.weight holds NaN or infinite values in .*m2"
    ):
        merge_checkpoints(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    summary = merge_checkpoints(config, tmp_path / "out", allow_non_finite=True)
    merged = read_result(tmp_path / "out")
    assert torch.equal(merged[name], states[1][name])
    assert all(bool(t.isfinite().all()) for t in merged.values())
    assert any("up_proj.weight) has weights" in note for note in summary.notes)
    assert any("and keeps the initialisation" in note for note in summary.notes)
    counted = summary.methods["mats"]
    assert (counted.non_finite, counted.non_finite_out) == (1, 0)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(summary_table(summary))
    row = next(line for line in console.export_text().splitlines() if "mats" in line)
    assert row.split()[-3:] == ["solved", "1", "0"]


@pytest.mark.parametrize("chunk", [8, 1 << 20])
@pytest.mark.parametrize("init", ["average", "pretrained", "ties"])
def test_fisher_of_a_model_that_is_not_finite(models, tmp_path, init, chunk) -> None:
    """N2: the tensor is the initialisation, from its first chunk on, wherever the NaN is."""
    sizes = Sizes(fisher_chunk=chunk)
    folders, files, states = models
    name = "model.layers.0.mlp.up_proj.weight"
    sick = {n: t.clone() for n, t in states[2].items()}
    sick[name][-1, 3] = torch.inf
    shutil.rmtree(folders[2])
    write_model(folders[2], sick)
    config = recipe("fisher", folders[1:], files, folders[0], init=init)
    with pytest.raises(NonFiniteError, match=r"up_proj.weight holds NaN or .* values in .*m2;"):
        merge_in(sizes, config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    summary = merge_in(sizes, config, tmp_path / "out", allow_non_finite=True)
    reports: list[Any] = []
    with pytest.warns(UserWarning, match=r"1 layer \(.*up_proj.weight\) .* NaN or infinity"):
        want = pymerge.merge(
            [states[1], sick], states[0], method="fisher", statistics=files, init=init, reports=reports, non_finite="allow"
        )  # fmt: skip
    merged = read_result(tmp_path / "out")
    for each, tensor in want.items():
        assert relative(merged[each], tensor) < 2e-6, each
    if init != "ties":
        assert torch.equal(merged[name], states[1 if init == "average" else 0][name])
    statuses = {r.name: (r.status, r.message) for r in reports}
    assert statuses.pop(name) == ("non_finite", "weights[1]: NaN or infinity")
    assert {status for status, _ in statuses.values()} == {"exact"}
    written = json.loads((tmp_path / "out/merge_report.json").read_text())["layers"]
    assert {r["name"]: r["status"] for r in written} == {r.name: r.status for r in reports}
    assert any(name in note and "keep" in note for note in summary.notes)
    assert summary.methods["fisher"].non_finite == 1


def test_statistics_that_are_not_finite_keep_the_initialisation(models, tmp_path) -> None:
    folders, files, _ = models
    bad = bytearray(files[0].read_bytes())
    bad[-8:-4] = b"\x00\x00\xc0\x7f"  # a NaN in the last sum of the file
    files[0].write_bytes(bad)
    for method in ("mats", "fisher"):
        out = tmp_path / method
        summary = merge_checkpoints(recipe(method, folders[1:], files), out)
        assert all(bool(t.isfinite().all()) for t in read_result(out).values())
        if method == "fisher":  # whose sums come last in the file
            assert any("NaN or infinity" in note for note in summary.notes)
            rows = json.loads((out / "merge_report.json").read_text())["layers"]
            (row,) = [row for row in rows if row["status"] == "non_finite"]
            assert row["message"] == "fishers[0]: NaN or infinity"
            assert summary.methods["fisher"].non_finite == 1


def test_not_finite_counts_after_a_resume(models, tmp_path) -> None:
    """Weights, and input sums, for both layers that share them; files that were finished before
    count too.
    """
    folders, files, states = models
    sick = {n: t.clone() for n, t in states[2].items()}
    sick["model.layers.0.self_attn.q_proj.weight"][:2] = torch.inf
    shutil.rmtree(folders[2])
    write_model(folders[2], sick)
    write_statistics(files[1], sick, 2)
    held = load(files[0]).header["tensors"]
    sums = load_file(files[0])
    key = next(k for k in held if k.startswith("input_gram/model.layers.1"))
    sums[key][:3] = torch.nan
    rows = sick["model.layers.0.self_attn.q_proj.weight"].shape[1] * 2
    content = safe_open(files[0], "pt").metadata()
    save_file(sums, files[0], metadata=content)
    config = recipe("mats", folders[1:], files)

    def stop(done: int, total: int, name: str) -> None:
        if "layers.1.mlp" in name:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"allow_non_finite": True}
    together = merge_checkpoints(config, tmp_path / "whole", **options)
    assert together.methods["mats"].non_finite == rows + 2 * 3
    options["out_shard_size"] = 1500
    with pytest.raises(KeyboardInterrupt):
        merge_checkpoints(config, tmp_path / "out", progress=stop, **options)
    summary = merge_checkpoints(config, tmp_path / "out", resume=True, **options)
    assert summary.resumed
    assert summary.methods["mats"].non_finite == rows + 2 * 3
    manifest = json.loads((tmp_path / "out/pymerge_manifest.json").read_text())
    assert manifest["methods"]["mats"]["non_finite"] == rows + 2 * 3


def test_resume_takes_over_reports(models, tmp_path) -> None:
    folders, files, _ = models
    config = recipe("mats", folders[1:], files)
    merge_checkpoints(config, tmp_path / "whole", out_shard_size=1500)
    out = tmp_path / "out"

    def stop(done: int, total: int, name: str) -> None:
        if "layers.1.mlp" in name:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_checkpoints(config, out, out_shard_size=1500, progress=stop)
    summary = merge_checkpoints(config, out, out_shard_size=1500, resume=True)
    assert summary.resumed > 0
    for file in sorted((tmp_path / "whole").iterdir()):
        if file.name not in ("pymerge_manifest.json", "README.md"):
            assert (out / file.name).read_bytes() == file.read_bytes(), file.name
    # Other statistics are another merge.
    with pytest.raises(KeyboardInterrupt):
        merge_checkpoints(config, tmp_path / "again", out_shard_size=1500, progress=stop)
    files[0].touch()
    with pytest.raises(OutputError, match="changed since"):
        merge_checkpoints(config, tmp_path / "again", out_shard_size=1500, resume=True)


@pytest.mark.parametrize("method", ["mats", "regmean", "fisher"])
def test_threads(tmp_path, method) -> None:
    """The bytes of `fisher` do not depend on their number; solved layers to the last bits, the
    other tensors not at all.
    """
    generator = torch.Generator().manual_seed(0)
    folders, files = [], []
    for k in range(2):
        state = {
            "model.layers.0.mlp.up_proj.weight": torch.randn(300, 500, generator=generator),
            "model.layers.0.norm.weight": torch.randn(70_000, generator=generator),
        }
        folders.append(write_model(tmp_path / f"m{k}", state))
        files.append(write_statistics(tmp_path / f"{k}.stats", state, k, kinds=KINDS))
    config = recipe(method, folders, files)
    found = []
    for threads in (1, 2, 3, 5):
        merge_checkpoints(config, tmp_path / str(threads), threads=threads)
        found.append(read_result(tmp_path / str(threads)))
    again = tmp_path / "again"
    merge_checkpoints(config, again, threads=2)
    assert all(torch.equal(t, found[1][name]) for name, t in read_result(again).items())
    for other in found[1:]:
        for name, tensor in found[0].items():
            if method == "fisher" or "norm" in name:
                assert torch.equal(other[name], tensor)
            else:
                assert relative(other[name], tensor) < 2e-6


def test_read_instead_of_mapped(models, tmp_path, monkeypatch) -> None:
    folders, files, _ = models
    config = recipe("mats", folders[1:], files)
    monkeypatch.setenv("PYMERGE_IO", "mmap")
    merge_checkpoints(config, tmp_path / "mapped")
    monkeypatch.setenv("PYMERGE_IO", "read")
    merge_checkpoints(config, tmp_path / "read")
    name = "model.safetensors"
    assert (tmp_path / "read" / name).read_bytes() == (tmp_path / "mapped" / name).read_bytes()


def test_sharded_inputs_and_slices(models, tmp_path) -> None:
    folders, files, states = models
    for k in (1, 2):
        shutil.rmtree(folders[k])
        write_sharded(folders[k], states[k])
    want, _ = merge_with_statistics(states[1:], None, files)
    merge_checkpoints(recipe("mats", folders[1:], files), tmp_path / "out")
    for name, tensor in read_result(tmp_path / "out").items():
        assert relative(tensor, want[name]) < 2e-6
    sources = [
        {"model": str(folder), "layer_range": [1, 2], "statistics": str(file)}
        for folder, file in zip(folders[1:], files, strict=True)
    ]
    config = {"merge_method": "mats", "slices": [{"sources": sources}]}
    merge_checkpoints(config, tmp_path / "sliced")
    got = read_result(tmp_path / "sliced")
    for part in ("self_attn.q_proj", "mlp.up_proj"):
        merged = got[f"model.layers.0.{part}.weight"]
        assert relative(merged, want[f"model.layers.1.{part}.weight"]) < 2e-6


@pytest.mark.filterwarnings("ignore:.*moved more than")
def test_conv1d_and_vectors_of_a_real_model(tmp_path) -> None:
    """GPT-2 stores its weights (d_in, d_out) and ties its head; biases and norms have block
    Fishers.
    """
    pytest.importorskip("transformers")
    folders, files, states = [], [], []
    for number in range(2):
        model = statistics_cases.gpt2().float()
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        folders.append(tmp_path / f"m{number}")
        model.save_pretrained(folders[-1])
        states.append(load_file(folders[-1] / "model.safetensors"))
        files.append(tmp_path / f"{number}.stats")
        kinds = ("input_gram", "output_grad_gram", "block_fisher")
        batches = statistics_cases.token_batches(30)
        statistics.collect(model, batches, loss="causal-lm", kinds=kinds, out=files[-1])
    config = recipe("mats", folders, files)
    plan = plan_checkpoints(config)
    assert not plan.problems
    assert any(t.solve and t.solve.transposed for t in plan.tensors)
    assert any(t.solve and len(t.shape) == 1 for t in plan.tensors)
    merge_checkpoints(config, tmp_path / "out")
    want, _ = merge_with_statistics(states, None, files)
    got = read_result(tmp_path / "out")
    for name, tensor in want.items():
        assert relative(got[name], tensor) < 1e-5, name
