"""The README's tables and the charts say what the code and the committed results say."""

from __future__ import annotations

import re

import pytest
from doc_pages import ROOT, script

from pymerge.backends.registry import TABLE
from pymerge.methods import METHODS

README = (ROOT / "README.md").read_text(encoding="utf-8")
BACKENDS = ("cpu", "cuda", "triton")
charts = script("benchmarks/charts.py")


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without its head."""
    section = README.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def kernels_of(method: str) -> list[str]:
    """The ops of the registry that compute a method; none where plain torch does."""
    found = METHODS[method]
    if found.op == "gram":
        return ["gram", "combine"]
    if found.op == "masked":
        return ["masked"]
    if found.op == "statistics":
        return ["cg"] if method == "mats" else []
    if found.op == "matrix":
        return ["cg"] if method == "wudi" else []
    if found.fixed.get("trim") == "magprune":
        return ["ties", "magprune"]
    return ["ties"]


def test_the_table_of_methods_and_backends():
    shown = {}
    for names, _, *cells in rows("Methods"):
        for name in re.findall(r"`(\w+)`", names):
            shown[name] = cells
    assert shown.keys() == METHODS.keys()
    for name, cells in shown.items():
        ops = kernels_of(name)
        wanted = [
            "✓" if ops and all(backend in TABLE[op] for op in ops) else "torch"
            for backend in BACKENDS
        ]
        assert cells == wanted, name


@pytest.mark.parametrize("path", charts.outputs(), ids=lambda path: path.name)
def test_charts_and_table_are_of_the_committed_results(path):
    """Otherwise: python benchmarks/charts.py"""
    assert path.read_text(encoding="utf-8") == charts.outputs()[path]


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (53.287, "53"),
        (568.3, "570"),
        (6.613, "6.6"),
        (1.02, "1.0"),
        (11281, "11,000"),
        (0.0996, "0.10"),
    ],
)
def test_two_digits(value, wanted):
    assert charts.rounded(value) == wanted


def test_charts_follow_the_readers_colours():
    for path, text in charts.outputs().items():
        if path.suffix == ".svg":
            assert "prefers-color-scheme:dark" in text
            assert not re.findall(r"(?:fill|stroke)=\"#", text)
            names = set(re.findall(r"var\((--\w+)\)", text))
            css = (ROOT / "docs/assets/site.css").read_text(encoding="utf-8")
            for scheme in ("default", "slate"):
                rule = css.partition(f'"{scheme}"')[2].partition("}")[0]
                assert names <= set(re.findall(r"(--\w+):", rule)), scheme


def test_the_licence_and_the_citation_are_of_this_package():
    yaml = pytest.importorskip("yaml")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{cited["version"]}"' in project
    assert f'license = "{cited["license"]}"' in project
    papers = [each["identifiers"][0]["value"] for each in cited["references"]]
    assert papers == ["arXiv:2306.01708", "arXiv:2312.04339"]


def test_a_bug_report_is_asked_for_what_it_needs():
    yaml = pytest.importorskip("yaml")
    folder = ROOT / ".github" / "ISSUE_TEMPLATE"
    for path in folder.glob("*.yml"):
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        if path.name != "config.yml":
            fields = [each["id"] for each in form["body"]]
            assert len(fields) == len(set(fields)) and form["name"] and form["description"]
    bug = yaml.safe_load((folder / "bug.yml").read_text(encoding="utf-8"))
    doctor = next(each for each in bug["body"] if each["id"] == "doctor")
    assert "pymerge doctor" in doctor["attributes"]["label"] and doctor["validations"]["required"]
