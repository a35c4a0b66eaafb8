"""What a wheel and an sdist hold, and the commands that CI runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from test_imports import ROOT, modules


def test_packages_are_all_listed():
    tomllib = pytest.importorskip("tomllib", reason="tomllib comes with Python 3.11")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    in_tree = {m for m, path in modules().items() if path.name == "__init__.py"}
    assert sorted(listed) == sorted(in_tree)


# A compiler that reads every header and makes empty files: whether the sources are all there, it
# says in seconds. With -E, -c is ignored; the output is the last word of each command.
PREPROCESSOR = """#!/bin/sh
for output; do :; done
case " $* " in *" -c "*) c++ -E "$@" || exit ;; esac
: > "$output"
"""


@pytest.fixture(
    scope="module", params=["preprocessed", pytest.param("compiled", marks=pytest.mark.slow)]
)
def distributions(request, tmp_path_factory):
    """(members of the sdist, members of the wheel built from that sdist): preprocessed only, or
    compiled without optimisation.
    """
    pytest.importorskip("pybind11")
    folder = tmp_path_factory.mktemp("dist")
    tree = folder / "tree"
    ignored = shutil.ignore_patterns(
        ".git",
        ".venv",
        "build",
        "dist",
        "demo-output",
        "*.egg-info",
        "__pycache__",
        "*.so",
        ".*_cache",
    )
    shutil.copytree(ROOT, tree, ignore=ignored)
    code = "import sys, setuptools.build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"
    environment = {**os.environ, "PYMERGE_CUDA": "0", "CXXFLAGS": "-O0 -w"}
    if request.param == "preprocessed":
        compiler = folder / "preprocessor"
        compiler.write_text(PREPROCESSOR)
        compiler.chmod(0o755)
        environment["CXX"] = str(compiler)

    def build(kind: str, source: Path) -> Path:
        command = [sys.executable, "-c", code, kind, str(folder)]
        result = subprocess.run(
            command, cwd=source, env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr[-4000:]
        return folder / result.stdout.splitlines()[-1]

    sdist = build("build_sdist", tree)
    with tarfile.open(sdist) as archive:
        source_members = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(folder / "unpacked", filter="data")
    wheel = build("build_wheel", next((folder / "unpacked").iterdir()))
    with zipfile.ZipFile(wheel) as archive:
        return source_members, set(archive.namelist())


def test_the_wheels_only_top_level_is_pymerge(distributions):
    _, wheel = distributions
    top = {name.partition("/")[0] for name in wheel}
    assert {name for name in top if not name.endswith(".dist-info")} == {"pymerge"}


def test_a_wheel_built_from_the_sdist_is_complete(distributions):
    sdist, wheel = distributions
    assert {"LICENSE", "README.md", "setup.py", "csrc/bindings.cpp", "docs/spec/ties.md"} <= sdist
    assert {"mkdocs.yml", "docs/hooks.py", "CITATION.cff", "SECURITY.md"} <= sdist
    wanted = {module.replace(".", "/") for module in modules()}
    missing = {
        name for name in wanted if f"{name}.py" not in wheel and f"{name}/__init__.py" not in wheel
    }
    assert not missing
    assert "pymerge/py.typed" in wheel
    assert any(re.fullmatch(r"pymerge/_C\..*so", name) for name in wheel)


@pytest.mark.parametrize("repository", ["", "https://host.example/who/what/"])
def test_the_readmes_links_lead_somewhere_on_an_index_page(repository, tmp_path):
    pytest.importorskip("pybind11")
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("pymerge", "triton_kernels", "csrc"):
        (tree / name).symlink_to(ROOT / name)
    code = "import setuptools.build_meta as b; b.prepare_metadata_for_build_wheel('..')"
    environment = {**os.environ, "PYMERGE_CUDA": "0", "PYMERGE_REPOSITORY": repository}
    subprocess.run([sys.executable, "-c", code], cwd=tree, env=environment, check=True)
    metadata = next(tmp_path.glob("*.dist-info/METADATA")).read_text(encoding="utf-8")
    head, _, readme = metadata.partition("\n\n")
    assert "Description-Content-Type: text/markdown" in head
    assert readme.startswith("# pymerge\n")
    targets = re.findall(r"\]\(([^)]*)\)", re.sub(r"```.*?```", "", readme, flags=re.DOTALL))
    urls = re.findall(r"^Project-URL: \w+, (.*)$", head, re.MULTILINE)
    assert all(each.startswith("https://host.example/who/what/") for each in targets)
    if repository:
        assert "https://host.example/who/what/blob/main/docs/mats.md#three-commands" in targets
        assert "https://host.example/who/what/raw/main/docs/images/speed.svg" in targets
        assert "https://host.example/who/what" in urls
    else:
        assert not targets and not urls


def test_a_release_has_one_version_and_says_its_changes(tmp_path):
    pytest.importorskip("tomllib", reason="tomllib comes with Python 3.11")
    (tmp_path / "pymerge").mkdir()
    for name in ("pyproject.toml", "CITATION.cff", "pymerge/version.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    script = tmp_path / "tests" / "wheels" / "version.py"
    script.parent.mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "wheels" / "version.py", script)
    changes = tmp_path / "CHANGELOG.md"
    changes.write_text(
        "# Changes\n\n## Unreleased\n\n- c\n\n## 0.1.0 (2026)\n\n- a\n- b\n\n## 0.0.9\n"
    )

    def run(*words):
        command = [sys.executable, str(script), *words]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr.strip()

    assert run("v0.1.0") == (0, "", "")
    assert run("v0.1.0", "--changes") == (0, "- a\n- b\n", "")
    assert run("v0.1.1") == (1, "", "pyproject.toml has version 0.1.0, but the tag is v0.1.1")
    changes.write_text("# Changes\n\n## Unreleased\n")
    assert run("v0.1.0") == (1, "", 'CHANGELOG.md has no section "## 0.1.0"')


def test_workflows_run_what_is_there():
    yaml = pytest.importorskip("yaml")
    made = (ROOT / "Makefile").read_text()
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        for job in yaml.safe_load(path.read_text())["jobs"].values():
            words = [job.get("uses", ""), *(step.get("run", "") for step in job.get("steps", []))]
            for file in re.findall(r"(?:\./)?((?:\.ci|\.github|tests)/[\w./-]+)", " ".join(words)):
                assert (ROOT / file).is_file(), (path.name, file)
            for target in re.findall(r"\bmake (\w+)", " ".join(words)):
                assert re.search(rf"^{target}:", made, re.MULTILINE), (path.name, target)


def test_the_readme_has_the_two_commands_that_ci_knows():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.partition("\n## From a clone\n")[2]
    block = re.search(r"```sh\n(.*?)```", section, re.DOTALL)
    assert block is not None
    commands = [line.split("#")[0].strip() for line in block[1].splitlines()]
    assert commands == ["make demo", "make test"]
    ci = ROOT / ".ci" / "run"
    assert os.access(ci, os.X_OK) and "make test" in ci.read_text()
    assert "entry: make lint" in (ROOT / ".pre-commit-config.yaml").read_text()
    assert "make lint" in ci.read_text()
