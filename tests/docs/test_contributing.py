"""What CONTRIBUTING.md says of the tree is true: layers, files, functions, the places of an op."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from doc_pages import ROOT, blocks
from test_imports import LAYERS

PAGE = ROOT / "CONTRIBUTING.md"
TEXT = PAGE.read_text(encoding="utf-8")
FOLDERS = (
    ".github",
    "benchmarks",
    "csrc",
    "docs",
    "examples",
    "pymerge",
    "tests",
    "triton_kernels",
)
SOURCES = r"[\w./-]+\.(?:py|pyi|cpp|h|cu|cuh|md|yml|toml|txt|sh)"
FILES = {
    path.relative_to(ROOT).as_posix()
    for top in (ROOT.glob("*.*"), *((ROOT / name).rglob("*") for name in FOLDERS))
    for path in top
    if path.is_file() and "__pycache__" not in path.parts
}


def section(heading: str) -> str:
    found = re.search(rf"^##+ {re.escape(heading)}\n(.*?)(?=^##+ |\Z)", TEXT, re.M | re.S)
    assert found, heading
    return found[1]


def files(text: str) -> list[str]:
    """The files that the text names, each by its whole path or the end of it."""
    return [name for name in re.findall(r"`([^`\n]+)`", text) if re.fullmatch(SOURCES, name)]


def paths(name: str) -> list[Path]:
    return [ROOT / path for path in sorted(FILES) if f"/{path}".endswith(f"/{name}")]


def rows() -> list[str]:
    found = [line for line in TEXT.splitlines() if line.startswith("| ")]
    return [line for line in found if files(line)]


def test_layers_are_those_of_the_imports():
    tree = next(each.text for each in blocks(PAGE) if each.text.startswith("__main__"))
    listed = [f"pymerge.{name}" for line in tree.splitlines() for name in re.findall(r"^\w+", line)]
    assert listed == LAYERS[::-1]


def test_files_that_it_names_are_there():
    missing = [name for name in files(TEXT) if not paths(name)]
    assert not missing


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[2:40].strip())
def test_functions_of_a_row_are_in_its_files(row):
    sources = "\n".join(
        path.read_text(encoding="utf-8") for name in files(row) for path in paths(name)
    )
    words = set(re.findall(r"`([^`\n]+)`", row)) - set(files(row))
    named = [word.rpartition(".")[2] for word in words if re.fullmatch(r"(\w+\.)?\w+", word)]
    missing = [name for name in named if not re.search(rf"\b{name}\b", sources)]
    assert not missing


def test_places_of_an_op():
    """Every file with "gram" in its path is at a listed place, every listed place is some op's, and
    the files that name ops one by one name this one.
    """
    places = re.findall(r"`([\w/.]*<op>[\w/.]*)`", section("Add an op"))
    places = [place for place in places if "/" in place]
    its = [path for path in FILES if re.search(r"[/_]gram[/._]", path)]
    assert its
    own = tuple(place.replace("<op>", "gram") for place in places)
    assert [path for path in its if not path.startswith(own)] == []
    ops = [path.name for path in (ROOT / "pymerge" / "ops").iterdir() if path.is_dir()]
    for place in places:
        assert any((ROOT / place.replace("<op>", op)).exists() for op in ops), place
    for name in files(section("Add an op")):
        found = [path.read_text(encoding="utf-8") for path in paths(name)]
        assert any(re.search(r"\bgram\b", text) for text in found), name
