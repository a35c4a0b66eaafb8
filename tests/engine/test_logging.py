"""The library logs and prints nothing; what the command line says is its own."""

from __future__ import annotations

import ast
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from folder_cases import recipe, write_family

import pymerge

ROOT = Path(__file__).parents[2]


def test_a_merge_logs_what_it_does(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = {**recipe("ties", write_family(tmp_path), density=0.4), "name": "unused"}
    with caplog.at_level(logging.INFO, logger="pymerge"):
        summary = pymerge.merge_checkpoints(config, tmp_path / "out")
    first, *notes, last = [r.getMessage() for r in caplog.records if r.name == "pymerge.merge"]
    assert first.startswith("merging ") and "by ties: " in first
    assert summary.notes and notes == list(summary.notes)
    assert last.startswith(f"{tmp_path / 'out'} is complete: read {summary.bytes_read} bytes")
    assert {r.levelno for r in caplog.records} == {logging.INFO}
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="pymerge"):
        pymerge.merge_checkpoints(config, tmp_path / "other", dry_run=True)
    told = [r.getMessage() for r in caplog.records]
    assert told[0].startswith("planned: merging ") and not any("complete" in x for x in told)


def test_nothing_is_printed_that_nobody_asked_for(tmp_path: Path) -> None:
    config = {**recipe("ties", write_family(tmp_path), density=0.4), "name": "unused"}
    (tmp_path / "r.json").write_text(json.dumps(config))
    code = (
        "import logging, pymerge; pymerge.merge_checkpoints('r.json', 'out');"
        " logging.getLogger('pymerge').error('of no interest')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")


def test_only_the_command_line_writes_to_the_terminal() -> None:
    """click and rich are imported by it alone; ruff refuses `print` in the package (T20)."""
    allowed = ("cli/", "bench/", "__main__.py")
    wrong = []
    for path in sorted((ROOT / "pymerge").rglob("*.py")):
        where = path.relative_to(ROOT / "pymerge").as_posix()
        if where.startswith(allowed):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            if any(name.partition(".")[0] in ("click", "rich") for name in names):
                wrong.append(where)
    assert wrong == []
