"""What a sweep of folders must not lose: rows, kept models, and files of people in its folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from folder_cases import recipe as recipe_of
from folder_cases import write_family
from safetensors.torch import load_file

import pymerge
from pymerge.errors import CheckpointError, EvaluationError, OutputError

GRID = {"density": [0.2, 0.5]}


@pytest.fixture
def recipe(tmp_path):
    return recipe_of("ties", write_family(tmp_path))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "swept"


def rows(out: Path):
    return json.loads((out / "sweep.json").read_text())["rows"]


def names(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir())


def model(folder: Path) -> torch.Tensor:
    return load_file(folder / "model.safetensors")["lm_head.weight"]


def test_a_kept_model_is_not_replaced_by_that_of_another_grid(recipe, out):
    first = pymerge.sweep_checkpoints(recipe, GRID, out)
    before = {str(row.setting): model(row.folder) for row in first.rows}
    wider = {"density": [0.9, 0.2, 0.5]}
    swept = pymerge.sweep_checkpoints(recipe, wider, out, resume=True)
    assert len({row.folder for row in swept.rows}) == 3
    for row in swept.rows[1:]:
        assert torch.equal(model(row.folder), before[str(row.setting)])
    assert not torch.equal(model(swept.rows[0].folder), before["{'density': 0.2}"])


def test_rows_of_another_grid_stay_in_the_file(recipe, out):
    pymerge.sweep_checkpoints(recipe, GRID, out, evaluate=lambda folder: 1.0)
    asked = []

    def evaluate(folder):
        asked.append(folder)
        return 2.0

    other = pymerge.sweep_checkpoints(
        recipe, {"density": [0.9]}, out, evaluate=evaluate, resume=True
    )
    assert [row.setting for row in other.rows] == [{"density": 0.9}]
    assert [row["setting"]["density"] for row in rows(out)] == [0.9, 0.2, 0.5]
    assert [row.get("folder") for row in rows(out)] == ["best", None, None]
    pymerge.sweep_checkpoints(recipe, GRID, out, evaluate=evaluate, resume=True)
    assert len(asked) == 1
    assert sorted(row["metrics"]["score"] for row in rows(out)) == [1.0, 1.0, 2.0]


def test_a_resume_that_ends_early_loses_no_rows(recipe, out):
    found = iter([{"a": 1.0, "b": 1.0}, {"a": 2.0}])
    pymerge.sweep_checkpoints(recipe, GRID, out, evaluate=lambda folder: next(found))
    before = rows(out)
    with pytest.raises(EvaluationError, match="no 'b'"):
        pymerge.sweep_checkpoints(recipe, GRID, out, evaluate=pytest.fail, metric="b", resume=True)
    assert rows(out) == before


def test_models_that_were_not_evaluated_are(recipe, out):
    pymerge.sweep_checkpoints(recipe, GRID, out)
    asked = []

    def evaluate(folder):
        asked.append(folder.name)
        return len(asked)

    swept = pymerge.sweep_checkpoints(recipe, GRID, out, evaluate=evaluate, resume=True)
    assert asked == ["setting-001", "setting-002"]
    assert swept.best.setting == {"density": 0.5}
    assert names(out) == ["best", "sweep.json"]


@pytest.mark.parametrize("how", [{"evaluate": None}, {"keep_all": True}])
def test_models_that_were_removed_are_made_again_where_all_are_to_be_kept(recipe, out, how):
    pymerge.sweep_checkpoints(recipe, GRID, out, evaluate=lambda folder: 1.0)
    asked = {"evaluate": pytest.fail, **how}
    swept = pymerge.sweep_checkpoints(recipe, GRID, out, resume=True, **asked)
    assert all((row.folder / "model.safetensors").exists() for row in swept.rows)
    assert len({row.folder for row in swept.rows}) == 2
    assert [row.metrics for row in swept.rows] == [{"score": 1.0}] * 2


def test_what_an_evaluation_writes_beside_a_model_stays(recipe, out):
    found = iter([1.0, 3.0, 2.0])

    def evaluate(folder):
        (folder / "predictions").mkdir()
        (folder / "predictions" / "all.txt").write_text(folder.name)
        return next(found)

    grid = {"density": [0.2, 0.5, 0.9]}
    pymerge.sweep_checkpoints(recipe, grid, out, evaluate=evaluate)
    left = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    predictions = {f"{name}/predictions/all.txt" for name in ("setting-001", "setting-003", "best")}
    assert predictions <= left
    assert {path.split("/")[0] for path in left - predictions} == {"best", "sweep.json"}


def notes(best: Path) -> None:
    best.mkdir(exist_ok=True)
    (best / "notes.txt").write_text("mine")


def link(best: Path) -> None:
    elsewhere = best.parents[1] / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    (elsewhere / "notes.txt").write_text("mine")
    if best.is_dir():
        shutil.rmtree(best)
    best.symlink_to(elsewhere)


def file(best: Path) -> None:
    if best.is_dir():
        shutil.rmtree(best)
    best.write_text("mine")


@pytest.mark.parametrize("when", ["meanwhile", "between two sweeps"])
@pytest.mark.parametrize("act", [notes, link, file])
def test_what_has_the_name_of_the_best_model_is_not_deleted(recipe, out, act, when):
    if when == "meanwhile":

        def evaluate(folder):
            act(out / "best")
            return 1.0

        how = {"evaluate": evaluate}
        grid = {"density": [0.9]}
    else:
        pymerge.sweep_checkpoints(recipe, GRID, out, evaluate=lambda folder: 1.0)
        act(out / "best")
        grid = {"density": [0.2, 0.5, 0.9]}
        how = {"evaluate": lambda folder: 2.0, "resume": True}
    with pytest.warns(UserWarning, match=r"best held what this sweep did not write; it is .*-1"):
        swept = pymerge.sweep_checkpoints(recipe, grid, out, **how)
    assert swept.best.folder == out / "best" and not (out / "best").is_symlink()
    assert (out / "best" / "model.safetensors").exists()
    aside = out / "best-before-1"
    assert (aside if act is file else aside / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["mine", "..", "setting-", "best/../mine", 3])
def test_a_table_that_names_other_folders_is_refused(recipe, out, name):
    pymerge.sweep_checkpoints(recipe, GRID, out, evaluate=lambda folder: 1.0)
    mine = out / "mine" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    table = json.loads((out / "sweep.json").read_text())
    table["rows"][0]["folder"] = name
    (out / "sweep.json").write_text(json.dumps(table))
    with pytest.raises(OutputError, match="is no file of a sweep"):
        pymerge.sweep_checkpoints(
            recipe, {"density": [0.2, 0.9]}, out, evaluate=lambda folder: 2.0, resume=True
        )
    assert mine.exists() and (out / "best").exists()


def test_a_model_that_changes_between_two_settings(recipe, out, tmp_path):
    weights = tmp_path / "m1" / "model.safetensors"

    def evaluate(folder):
        content = weights.read_bytes()
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        return 1.0

    with pytest.raises(CheckpointError, match=r"m1/model\.safetensors: was written to"):
        pymerge.sweep_checkpoints(recipe, GRID, out, evaluate=evaluate)
    assert len(rows(out)) == 1
    assert names(out) == ["setting-001", "sweep.json"]


def test_an_output_in_a_model_makes_no_folder(recipe, tmp_path):
    inside = tmp_path / "m1" / "swept"
    with pytest.raises(OutputError, match="lies in the input"):
        pymerge.sweep_checkpoints(recipe, GRID, inside)
    assert not inside.exists()


def test_two_at_once(recipe, out):
    def evaluate(folder):
        with pytest.raises(OutputError, match="another sweep is writing"):
            pymerge.sweep_checkpoints(recipe, GRID, out, evaluate=pytest.fail, resume=True)
        return 1.0

    pymerge.sweep_checkpoints(recipe, GRID, out, evaluate=evaluate)
    pymerge.sweep_checkpoints(recipe, GRID, out, evaluate=pytest.fail, resume=True)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_sweep_that_is_stopped_in_its_first_merge_goes_on(recipe, out, number):
    """Also where it has no rows yet."""
    script = f"""
import os, pymerge, pymerge.sweeps.folders as folders
def merge(*args, **options):
    def stop(*_): os.kill(os.getpid(), {int(number)})
    return usual(*args, progress=stop, out_shard_size=1500, **options)
usual, folders.merge_checkpoints = folders.merge_checkpoints, merge
pymerge.sweep_checkpoints({recipe!r}, {GRID!r}, {str(out)!r})
"""
    done = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    assert done.returncode != 0 and "OutputError" not in done.stderr
    swept = pymerge.sweep_checkpoints(recipe, GRID, out, resume=True)
    assert [row.folder.name for row in swept.rows] == ["setting-001", "setting-002"]
    assert names(out) == ["setting-001", "setting-002", "sweep.json"]


def test_an_interrupt_while_a_model_is_removed_leaves_no_half_of_it(recipe, out, monkeypatch):
    from pymerge.sweeps import folders

    usual, threads = folders._remove, []

    def remove(folder):
        threads.append(threading.current_thread())
        os.kill(os.getpid(), signal.SIGINT)
        usual(folder)

    monkeypatch.setattr(folders, "_remove", remove)
    with pytest.raises(KeyboardInterrupt):
        pymerge.sweep_checkpoints(recipe, GRID, out, evaluate=lambda folder: 1.0)
    assert threads and threads[0] is not threading.main_thread()
    assert names(out) == ["setting-001", "sweep.json"]
    assert len(rows(out)) == 2
