"""`pymerge.sweep_checkpoints` and `pymerge sweep`: model folders for many settings of a recipe."""

from __future__ import annotations

import csv
import itertools
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from folder_cases import write_family
from safetensors.torch import load_file

import pymerge
from pymerge.cli import sweeping
from pymerge.cli.main import commands
from pymerge.errors import ConfigError, MergeError, OutputError
from pymerge.sweeps.folders import applied
from pymerge.sweeps.grid import parse_grid


@pytest.fixture
def recipe(tmp_path):
    base, *models = write_family(tmp_path)
    content = {
        "merge_method": "ties",
        "base_model": str(base),
        "models": [
            {"model": str(model), "parameters": {"weight": 1.0, "density": 0.9}} for model in models
        ],
        "parameters": {"normalize": True},
        "dtype": "float32",
    }
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump(content))
    return path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def single(recipe: Path, tmp_path: Path, **changes) -> dict[str, torch.Tensor]:
    content = yaml.safe_load(recipe.read_text())
    for model in content["models"]:
        model["parameters"].update(changes)
    out = tmp_path / "single"
    pymerge.merge_checkpoints(content, out, overwrite=True)
    return weights(out)


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_without_an_evaluation_every_model_is_written(recipe, tmp_path):
    out = tmp_path / "swept"
    swept = pymerge.sweep_checkpoints(recipe, {"density": [0.2, 0.6], "weight": [1.0, 0.5]}, out)
    assert [row.folder.name for row in swept.rows] == [f"setting-00{k}" for k in (1, 2, 3, 4)]
    for row in swept.rows:
        assert_equal(weights(row.folder), single(recipe, tmp_path, **row.setting))
    assert swept.best is None
    assert {path.name for path in out.iterdir()} == {
        "sweep.json",
        *(row.folder.name for row in swept.rows),
    }


def test_the_best_model_is_kept(recipe, tmp_path):
    out = tmp_path / "swept"
    asked = []

    def evaluate(folder):
        asked.append(weights(folder))
        return {"loss": [3.0, 1.0, 2.0][len(asked) - 1]}

    grid = {"density": [0.2, 0.4, 0.6]}
    swept = pymerge.sweep_checkpoints(recipe, grid, out, evaluate=evaluate, maximize=False)
    assert swept.metric == "loss" and swept.best.setting == {"density": 0.4}
    assert_equal(weights(out / "best"), asked[1])
    assert_equal(asked[1], single(recipe, tmp_path, density=0.4))
    assert sorted(path.name for path in out.iterdir()) == ["best", "sweep.json"]
    assert "density: 0.4" in (out / "best" / "README.md").read_text()


def test_a_sweep_goes_on_where_it_stopped(recipe, tmp_path):
    out = tmp_path / "swept"
    asked = []

    def evaluate(folder, fail_at=None):
        if len(asked) == fail_at:
            raise RuntimeError("out of luck")
        asked.append(folder.name)
        return 5 - len(asked)

    grid = {"density": [0.2, 0.4, 0.6]}
    with pytest.raises(RuntimeError, match="out of luck"):
        pymerge.sweep_checkpoints(recipe, grid, out, evaluate=lambda f: evaluate(f, 2))
    with pytest.raises(OutputError, match="not empty; name a new folder, or go on"):
        pymerge.sweep_checkpoints(recipe, grid, out, evaluate=evaluate)
    with pytest.raises(OutputError, match="of another sweep"):
        pymerge.sweep_checkpoints(recipe, grid, out, evaluate=evaluate, resume=True, seed=3)
    swept = pymerge.sweep_checkpoints(recipe, grid, out, evaluate=evaluate, resume=True)
    assert asked == ["setting-001", "setting-002", "setting-003"]
    assert [row.metrics["score"] for row in swept.rows] == [4, 3, 2]
    assert sorted(path.name for path in out.iterdir()) == ["best", "sweep.json"]
    assert_equal(weights(out / "best"), single(recipe, tmp_path, density=0.2))
    # Once more: nothing is left to evaluate, and a best model that is gone is made again.
    (out / "best" / "model.safetensors").unlink()
    for path in (out / "best").iterdir():
        path.unlink()
    (out / "best").rmdir()
    pymerge.sweep_checkpoints(recipe, grid, out, evaluate=evaluate, resume=True)
    assert len(asked) == 3
    assert_equal(weights(out / "best"), single(recipe, tmp_path, density=0.2))
    # A file of the inputs that changed since makes it another sweep.
    model = tmp_path / "m1" / "model.safetensors"
    content = model.read_bytes()
    model.unlink()
    model.write_bytes(content[:-1] + b"\x01")
    with pytest.raises(OutputError, match="of another sweep"):
        pymerge.sweep_checkpoints(recipe, grid, out, evaluate=evaluate, resume=True)


def test_every_model_can_be_kept(recipe, tmp_path):
    out = tmp_path / "swept"
    grid = {"merge_method": ["ties", "task_arithmetic"], "weight": [[1, 0.5], [0.5, 1]]}
    for model in (path := yaml.safe_load(recipe.read_text()))["models"]:
        del model["parameters"]
    swept = pymerge.sweep_checkpoints(path, grid, out, evaluate=lambda f: 1.0, keep_all=True)
    assert swept.best.folder == out / "setting-001"
    made = [weights(row.folder)["model.norm.weight"] for row in swept.rows]
    assert len(made) == 4
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(made, 2))


def test_settings_that_no_merge_takes_are_refused_before_any_work(recipe, tmp_path):
    out = tmp_path / "swept"
    for grid, match in (
        ({"density": [0.5, 2]}, r"with density=2, .*outside \[0, 1\]"),
        ({"densty": [0.5]}, "densty"),
        ({"merge_method": ["ties", "tise"]}, "tise"),
        ({"weight": [[1, 2, 3]]}, "3 values for 2 models"),
    ):
        with pytest.raises(ConfigError, match=match):
            pymerge.sweep_checkpoints(recipe, grid, out, evaluate=pytest.fail)
    (tmp_path / "m2" / "model.safetensors").unlink()
    with pytest.raises(MergeError, match="m2"):
        pymerge.sweep_checkpoints(recipe, {"density": [0.5]}, out, evaluate=pytest.fail)
    assert not out.exists()


def test_what_is_no_folder_of_a_sweep(recipe, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious.txt").write_text("")
    for out in (full, recipe):
        for resume in (False, True):
            with pytest.raises(OutputError):
                pymerge.sweep_checkpoints(recipe, {"density": [0.5]}, out, resume=resume)
    assert (full / "precious.txt").exists()


def test_where_a_setting_goes_in_a_recipe():
    data = {
        "merge_method": "ties",
        "base_model": "b",
        "models": [
            {"model": "b"},
            {"model": "x", "parameters": {"density": [{"filter": "mlp", "value": 1}, 0.5]}},
            {"model": "y"},
        ],
        "parameters": {"density": 0.1, "normalize": True},
    }
    made = applied(data, {"density": 0.3, "merge_method": "dare_ties", "scaling": 2}, "r")
    assert made["merge_method"] == "dare_ties"
    assert made["parameters"] == {"density": 0.3, "normalize": True, "lambda": 2}
    assert made["models"][1]["parameters"] == {}
    made = applied(data, {"density": [0.3, 0.4]}, "r")
    assert "density" not in made["parameters"]
    assert [m.get("parameters") for m in made["models"]] == [
        None,
        {"density": 0.3},
        {"density": 0.4},
    ]
    assert data["parameters"]["density"] == 0.1  # the recipe itself is as it was


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("density=0.1,0.2", [0.1, 0.2]),
        ("lambda=0.1:0.3:0.1", [0.1, 0.2, 0.3]),
        ("lambda=1:0:-0.5", [1.0, 0.5, 0.0]),
        ("lambda=0:1:0.3", [0.0, 0.3, 0.6, 0.9]),
        ("weight=[1,0.5],[0.5,1]", [[1, 0.5], [0.5, 1]]),
        ("merge_method=ties, dare_ties", ["ties", "dare_ties"]),
        ("normalize=true,false", [True, False]),
    ],
)
def test_values_on_the_command_line(text, values):
    assert parse_grid([text]) == {text.partition("=")[0]: values}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("density", "not NAME=VALUES"),
        ("=1", "not NAME=VALUES"),
        ("density=", "not NAME=VALUES"),
        ("density=[1", "commas"),
        ("density=0:1:0", "no way to 1"),
        ("density=0:1:-1", "no way to 1"),
        ("density=0:1:0.000001", "1,000,001 settings"),
        ("density=0:1e9999:1", "more than 1,000,000,000,000,000 settings"),
        ("density=0:1:1e-400", "more than 1,000,000,000,000,000 settings"),
        ("density=0:1e999999:1e-99999", "no way to 1E"),
        ("density=0:0:0", "no way to 0"),
        ("density={a: 1}", "is a dict"),
    ],
)
def test_values_that_are_none(text, match):
    with pytest.raises(ConfigError, match=match):
        parse_grid([text])
    with pytest.raises(ConfigError, match="values already"):
        parse_grid(["density=1", "density=0.5"])


# Prints the mean of a tensor as JSON, after a line of its own.
SCRIPT = """
import json, sys
from pathlib import Path
folder = Path(sys.argv[1])
recipe = (folder / "README.md").read_text()
print("looking at", folder)
print(json.dumps({"mean": float(recipe.split("density: ")[1].split()[0])}))
"""


def run(*words):
    return CliRunner().invoke(commands, ["sweep", *map(str, words)])


def test_the_command(recipe, tmp_path):
    out, script = tmp_path / "swept", tmp_path / "evaluate.py"
    script.write_text(SCRIPT)
    command = f"{sys.executable} {script} {{}}"
    done = run(recipe, out, "--grid", "density=0.3:0.5:0.1", "--evaluate", command, "--minimize")
    assert done.exit_code == 0, done.output
    assert "2/3  density=0.4  mean 0.4" in done.stderr
    assert f"best: density=0.3  mean 0.3: {out / 'best'}" in done.stdout
    with (out / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [{"density": d, "mean": d} for d in ("0.3", "0.4", "0.5")]
    assert json.loads((out / "sweep.json").read_text())["best"] == {"density": 0.3}
    assert (out / "best" / "model.safetensors").exists()
    again = run(
        recipe, out, "--grid", "density=0.3:0.5:0.1", "--evaluate", "false", "--resume", "-q"
    )
    assert (again.exit_code, again.output) == (0, "")


def test_the_command_without_an_evaluation(recipe, tmp_path):
    out = tmp_path / "swept"
    done = run(recipe, out, "--grid", "density=0.3,0.5")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [
        "density  folder",
        "0.3      setting-001",
        "0.5      setting-002",
    ]
    assert not (out / "sweep.svg").exists()


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--grid", "density=0.5", "--evaluate", "false"], "ended with status 1"),
        (["--grid", "density=0.5", "--evaluate", "true"], "last line that true"),
        (["--grid", "density=0.5", "--evaluate", "no-such-program"], "cannot be run"),
        (["--grid", "density=0.5", "--evaluate", "echo hello"], "last line"),
        (
            ["--grid", "density=0.5", "--evaluate", "sh -c 'echo 1'", "--metric", "x"],
            "no 'x'.*--metric",
        ),
        (["--grid", "density=0.5,0.5"], "--grid has the setting"),
        (["--grid", "density=2"], "density=2"),
    ],
)
def test_the_command_says_what_is_wrong(recipe, tmp_path, words, match):
    done = run(recipe, tmp_path / "swept", *words)
    assert done.exit_code == 1
    assert re.search(match, done.stderr)


def test_an_interruption_says_how_to_go_on(recipe, tmp_path, monkeypatch):
    out = tmp_path / "swept"
    found = iter([1.0])

    def evaluated(words, folder):
        for value in found:
            return value
        raise KeyboardInterrupt

    monkeypatch.setattr(sweeping, "evaluated", evaluated)
    done = run(recipe, out, "--grid", "density=0.3,0.5", "--evaluate", "true {}")
    assert done.exit_code == 130
    again = f"sweep {recipe} {out} --resume --grid density=0.3,0.5 --evaluate 'true {{}}'"
    assert again in done.stderr
    assert json.loads((out / "sweep.json").read_text())["rows"][0]["metrics"] == {"score": 1.0}


@pytest.mark.parametrize("folder", ["", ".", "..", "../x", "notes", "setting-1/..", "bests", 1, []])
def test_only_folders_of_a_sweep_are_removed(recipe, tmp_path, folder):
    """A damaged table may name any folder as that of a setting that is not the best."""
    out = tmp_path / "swept"
    pymerge.sweep_checkpoints(recipe, {"density": [0.3, 0.5]}, out, evaluate=lambda path: 1.0)
    (out / "notes").mkdir()
    table = json.loads((out / "sweep.json").read_text())
    table["rows"][1]["folder"] = folder
    (out / "sweep.json").write_text(json.dumps(table))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match="is no file of a sweep"):
        pymerge.sweep_checkpoints(
            recipe, {"density": [0.3, 0.5]}, out, evaluate=pytest.fail, resume=True
        )
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"a":' * 10**5, b"\xff", b"{}", b"9" * 5000])
def test_a_damaged_table(recipe, tmp_path, content):
    (tmp_path / "swept").mkdir()
    (tmp_path / "swept" / "sweep.json").write_bytes(content)
    with pytest.raises(OutputError, match=r"sweep\.json: is n.*; remove it, or name another"):
        pymerge.sweep_checkpoints(recipe, {"density": [0.3]}, tmp_path / "swept", resume=True)


def test_a_measure_beyond_all_floats_in_a_table(recipe, tmp_path):
    out, grid = tmp_path / "swept", {"density": [0.3]}
    pymerge.sweep_checkpoints(recipe, grid, out, evaluate=lambda path: 1.0)
    table = (out / "sweep.json").read_text().replace("1.0\n", "9" * 400 + "\n")
    (out / "sweep.json").write_text(table)
    with pytest.raises(OutputError, match="is no file of a sweep"):
        pymerge.sweep_checkpoints(recipe, grid, out, evaluate=lambda path: 1.0, resume=True)


def test_a_sweep_goes_on_with_and_without_an_evaluation(recipe, tmp_path):
    """What the other kind of run left is no result of this one."""
    out, grid = tmp_path / "swept", {"density": [0.3, 0.5]}
    pymerge.sweep_checkpoints(recipe, grid, out)
    found = pymerge.sweep_checkpoints(recipe, grid, out, evaluate=lambda path: 2.0, resume=True)
    assert [row.metrics for row in found.rows] == [{"score": 2.0}] * 2
    assert found.best.folder == out / "best"
    assert sorted(path.name for path in out.iterdir()) == ["best", "sweep.json"]
    found = pymerge.sweep_checkpoints(recipe, grid, out, resume=True)
    for row in found.rows:
        assert_equal(weights(row.folder), single(recipe, tmp_path, **row.setting))


@pytest.mark.parametrize(
    ("printed", "match"),
    [
        ("[" * 10**5, "the last line that"),
        ("9" * 400, "gave 9+, which is beyond all floats"),
        ('{"\\ud800": 1}', "half a surrogate pair"),
        ('{"density": 1}', "a measure 'density', which is a parameter of the setting"),
    ],
    ids=["deep", "large", "surrogate", "parameter"],
)
def test_what_an_evaluation_may_not_print(recipe, tmp_path, printed, match):
    (tmp_path / "printed").write_text(printed)
    command = f"sh -c 'cat {tmp_path / 'printed'}' {{}}"
    done = run(recipe, tmp_path / "swept", "--grid", "density=0.5", "--evaluate", command)
    assert done.exit_code == 1, done.exception
    assert re.search(match, done.stderr)


def test_settings_of_which_none_is_the_best(recipe, tmp_path):
    done = run(recipe, tmp_path / "s", "--grid", "density=0.5", "--evaluate", "sh -c 'echo NaN'")
    assert done.exit_code == 0
    assert "note: score is NaN for every setting, so that none is the best" in done.stderr
    assert "best:" not in done.stdout


def test_options_of_a_merge_that_a_sweep_does_not_have(recipe, tmp_path):
    with pytest.raises(TypeError, match="no parameter 'dry_run'"):
        pymerge.sweep_checkpoints(recipe, {"density": [0.5]}, tmp_path / "out", dry_run=True)


@pytest.mark.parametrize(
    "options",
    [
        {"device": "abacus"},
        {"device": "cuda:99"},
        {"threads": -1},
        {"threads": "2"},
        {"out_shard_size": "five"},
        {"rank": 0},
        {"full_paths": "yes"},
        {"copy_tokenizer": 2},
    ],
    ids=str,
)
def test_options_that_no_merge_takes_are_told_before_anything_is_written(recipe, tmp_path, options):
    with pytest.raises((MergeError, TypeError, ValueError)):
        pymerge.sweep_checkpoints(recipe, {"weight": [1.0]}, tmp_path / "swept", **options)
    assert not (tmp_path / "swept").exists()
