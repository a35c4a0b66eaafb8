"""Where the standard output takes nothing: what was made stays, and the message says so."""

from __future__ import annotations

import errno
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from folder_cases import recipe, write_family

from pymerge.cli import terminal
from pymerge.cli.main import commands
from pymerge.errors import OutputError

FULL = Path("/dev/full")
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")
NOT_WRITTEN = "the standard output cannot be written (No space left on device)"


def run(folder: Path, *words: str, stream: str = "stdout") -> subprocess.CompletedProcess[str]:
    with FULL.open("w") as full:
        streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.run(
            [sys.executable, "-m", "pymerge", *words],
            cwd=folder,
            text=True,
            check=False,
            **(streams | {stream: full}),
        )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = recipe("ties", write_family(tmp_path), density=0.4)
    (tmp_path / "r.yml").write_text(json.dumps(config))
    return tmp_path


def test_a_merge_is_complete_and_says_so(folder: Path) -> None:
    done = run(folder, "merge", "r.yml", "out")
    assert done.returncode == 1
    assert done.stderr == f"error: {folder / 'out'} is complete, but {NOT_WRITTEN}; send it" \
        " elsewhere\n"  # fmt: skip
    assert run(folder, "merge", "r.yml", "out", "--overwrite", "-q").returncode == 0
    assert not (folder / ".out.pymerge-partial").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["plan", "r.yml"],
        ["doctor"],
        ["--help"],
        ["--version"],
        ["merge", "--help"],
        ["stats", "-h"],
        ["bench", "-h"],
    ],
    ids=" ".join,
)
def test_commands_that_only_print(folder: Path, words: list[str]) -> None:
    done = run(folder, *words)
    assert done.returncode == 1
    assert done.stderr == f"error: {NOT_WRITTEN}; send it elsewhere\n"


def test_a_standard_error_that_takes_nothing(folder: Path) -> None:
    assert run(folder, "merge", "r.yml", "out", stream="stderr").returncode == 0
    assert (folder / "out" / "model.safetensors").exists()
    assert run(folder, "merge", "nothing.yml", "new", stream="stderr").returncode == 1


class Failing(io.StringIO):
    """A file on a disk that is full for a while, or a terminal that was closed."""

    code = errno.ENOSPC

    def write(self, text: str) -> int:
        if self.code:
            raise OSError(self.code, "refused")
        return super().write(text)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EFBIG])
@pytest.mark.parametrize("is_terminal", [False, True])
def test_progress_that_cannot_be_shown_does_not_end_the_merge(
    monkeypatch: pytest.MonkeyPatch, code: int, is_terminal: bool
) -> None:
    monkeypatch.setattr(terminal, "PLAIN_EVERY", 0.0)
    file = Failing()
    file.code = code
    console = terminal.Screen(file=file, force_terminal=is_terminal)
    with terminal.progress(console) as advance:
        assert advance is not None
        for k in range(100):
            advance(k, 100, "w")
    with pytest.raises(OutputError, match=r"output cannot be written \(refused\)"):
        console.print("the summary")
    file.code = 0
    console.print("the summary")
    assert "the summary" in file.getvalue()


def test_a_reader_that_is_gone_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "PLAIN_EVERY", 0.0)
    file = Failing()
    file.code = errno.EPIPE
    with (
        pytest.raises(BrokenPipeError),
        terminal.progress(terminal.Screen(file=file)) as advance,
    ):
        assert advance is not None
        advance(50, 100, "w")


def test_what_torch_tells_its_developers_is_no_note(tmp_path):
    """Of a pickle protocol that it reads."""
    model = tmp_path / "m.bin"
    torch.save({"a.weight": torch.ones(2, 3)}, model, pickle_protocol=3)
    recipe = tmp_path / "r.yml"
    recipe.write_text(f"merge_method: passthrough\nmodels: [{{model: {model}}}]\n")
    result = CliRunner().invoke(commands, ["plan", str(recipe)])
    assert result.exit_code == 0 and "protocol" not in result.output
