"""Environment variables: all are on the page, and none that has a bad value is ignored."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from folder_cases import read_result, recipe, write_family

import pymerge
from pymerge.backends import registry
from pymerge.cli import doctor
from pymerge.cli.main import commands
from pymerge.compat import peft
from pymerge.errors import DeviceError

ROOT = Path(__file__).parents[2]
RUNNING = ("## When it runs", "## When it is built")


def on_the_page(section: str) -> set[str]:
    """The names in the first column of a section's table."""
    text = (ROOT / "docs/environment.md").read_text(encoding="utf-8")
    text = text.partition(section)[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def read_by(path: Path) -> set[str]:
    """Names that a Python file asks the environment for."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and re.search(
            r"\benviron\.(get|pop|setdefault)$|\bgetenv$", ast.unparse(node.func)
        ):
            key = node.args[0]
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("environ"):
            key = node.slice
        else:
            continue
        if isinstance(key, ast.Constant):
            found.add(key.value)
    return found


def test_all_variables_of_the_package_are_on_the_page():
    files = [*(ROOT / "pymerge").rglob("*.py"), *(ROOT / "triton_kernels").rglob("*.py")]
    found = set().union(*map(read_by, files))
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file():
            found |= set(re.findall(r'getenv\("(\w+)"', path.read_text(encoding="utf-8")))
    assert "PYMERGE_BACKEND" in found
    # OMP_NUM_THREADS is torch's to read; the page and `pymerge doctor` tell of it.
    assert on_the_page("## When it runs") == found | {"OMP_NUM_THREADS"}
    assert set(doctor._VARIABLES) == on_the_page("## When it runs") - {
        "TOKENIZERS_PARALLELISM",
        "NO_COLOR",
        "COMMIT",
    }


def test_all_variables_of_the_build_are_on_the_page():
    assert on_the_page("## When it is built") == read_by(ROOT / "setup.py")


def test_the_backends_on_the_page_are_those_that_there_are():
    text = (ROOT / "docs/environment.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith("| `PYMERGE_BACKEND`"))
    assert re.findall(r"`(\w+)`", row.split("|")[2]) == ["auto", *registry.BACKENDS]


def build(folder: Path, variables: dict[str, str]) -> str:
    """What setup.py says instead of building."""
    where = ["--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    command = [sys.executable, "setup.py", "-q", "build_ext", *where]
    environment = {**os.environ, "PYMERGE_CUDA": "auto", **variables}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    return done.stderr


@pytest.mark.parametrize(
    "variables, said",
    [
        ({"PYMERGE_CUDA": "yes"}, "PYMERGE_CUDA='yes' is not one of 'auto', '0', '1'"),
        ({"NVCC": "/nowhere/nvcc"}, "NVCC='/nowhere/nvcc' is no program"),
        (
            {"NVCC": sys.executable, "PYMERGE_CUDA_ARCHS": "80;ninety+PTX"},
            "PYMERGE_CUDA_ARCHS='80;ninety+PTX' has 'ninety+PTX', which is no compute capability",
        ),
        ({"PYMERGE_CUDA": "0", "PYMERGE_JOBS": "many"}, "PYMERGE_JOBS='many' is not a positive"),
        ({"PYMERGE_CUDA": "0", "PYMERGE_JOBS": "0"}, "PYMERGE_JOBS='0' is not a positive integer"),
    ],
)
def test_a_build_with_a_bad_value_stops(tmp_path, variables, said):
    pytest.importorskip("pybind11")
    assert said in build(tmp_path, variables)


@pytest.fixture
def family(tmp_path):
    write_family(tmp_path)
    (tmp_path / "recipe.yml").write_text(
        "merge_method: linear\nmodels:\n"
        + "".join(
            f"  - {{model: {tmp_path / m}, parameters: {{weight: 1}}}}\n" for m in ("m1", "m2")
        )
    )
    return tmp_path


def merge(family: Path, *options: str):
    """`pymerge merge`."""
    arguments = ["merge", str(family / "recipe.yml"), str(family / "out"), "--quiet", *options]
    return CliRunner().invoke(commands, arguments)


@pytest.mark.parametrize(
    "name, value",
    [
        ("PYMERGE_BACKEND", "reference"),
        ("PYMERGE_BACKEND", "gpu"),
        ("PYMERGE_BACKEND", "triton"),
        ("PYMERGE_CPU_LEVEL", "mmx"),
        ("PYMERGE_NUM_THREADS", "none"),
        ("PYMERGE_NUM_THREADS", "0"),
        ("PYMERGE_IO", "fast"),
    ],
)
def test_a_merge_with_a_bad_value_stops(family, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    result = merge(family)
    assert result.exit_code == 1 and result.stderr.startswith(f"error: {name}="), result.output
    assert value in result.stderr and "Traceback" not in result.stderr
    assert not (family / "out").exists()


BAD = [
    ("PYMERGE_BACKEND", "reference"),
    ("PYMERGE_BACKEND", "gpu"),
    ("PYMERGE_CPU_LEVEL", "mmx"),
    ("PYMERGE_NUM_THREADS", "none"),
    ("PYMERGE_IO", "fast"),
]


@pytest.mark.parametrize("name, value", BAD)
def test_a_plan_with_a_bad_value_stops(family, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    for command in (["plan"], ["merge", "--dry-run", str(family / "out")]):
        command.insert(1, str(family / "recipe.yml"))
        result = CliRunner().invoke(commands, command)
        assert result.exit_code == 1 and result.stderr.startswith(f"error: {name}="), result.output
    with pytest.raises(ValueError, match=f"{name}=.?{value}"):
        pymerge.merge_checkpoints(family / "recipe.yml", family / "out", dry_run=True)


NAMES = (*dict.fromkeys(name for name, _ in BAD), "TRITON_INTERPRET")


@pytest.mark.parametrize(
    "value", ["\udcff", "x" * 5000, "\x1b[31m"], ids=["bytes", "long", "escape"]
)
@pytest.mark.parametrize("command", ["merge", "plan", "analyze", "sweep", "doctor"])
def test_values_that_are_no_text_are_told_too(family, monkeypatch, command, value):
    words = {"merge": ["out"], "sweep": ["out", "--grid", "weight=1"], "doctor": None}
    more = words.get(command, [])
    line = [command] if more is None else [command, str(family / "recipe.yml"), *more]
    monkeypatch.chdir(family)
    for name in NAMES:
        monkeypatch.setenv(name, value)
        result = CliRunner().invoke(commands, line)
        told = more is not None and name != "TRITON_INTERPRET"
        assert result.exit_code == told, result.output
        assert not told or result.stderr.startswith(f"error: {name}="), result.output
        assert name in result.output or not told
        assert "\x1b" not in result.output and "x" * 1000 not in result.output
        monkeypatch.delenv(name)


def test_an_analysis_with_a_bad_value_stops_before_the_work(family, monkeypatch):
    for name, value in BAD[2:]:
        monkeypatch.setenv(name, value)
        result = CliRunner().invoke(commands, ["analyze", str(family / "recipe.yml")])
        assert result.exit_code == 1 and result.stderr.startswith(f"error: {name}="), result.output
        monkeypatch.delenv(name)


def test_a_bench_with_a_bad_backend_stops(monkeypatch):
    monkeypatch.setenv("PYMERGE_BACKEND", "foo")
    small = ["bench", "--size", "1K", "--models", "2", "--family", "fp32", "--repeats", "1"]
    result = CliRunner().invoke(commands, small)
    assert result.exit_code == 1 and "--backend" not in result.stderr
    assert result.stderr.lower().startswith("error: pymerge_backend='foo' is not one of 'auto'")
    result = CliRunner().invoke(commands, [*small, "--backend", "bar"])
    assert result.exit_code == 2 and "'--backend': backend='bar' is not one of" in result.stderr


@pytest.mark.parametrize("name, value", [*BAD[1:], ("TRITON_INTERPRET", "perhaps")])
def test_doctor_says_what_is_bad(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    text = doctor.collect().text()
    assert re.search(
        rf"^{name} +{value} \(environment\); error: {name}=.*{value}", text, re.MULTILINE
    )
    if name == "PYMERGE_CPU_LEVEL":
        for op in ("ties", "select", r"mats \(cg\)"):
            assert re.search(rf"^{op} +cpu +not available: {name}", text, re.MULTILINE)
    if name == "PYMERGE_NUM_THREADS":
        assert re.search(rf"^threads +none: {name}", text, re.MULTILINE)


def test_doctor_has_nothing_to_say_of_good_values(monkeypatch):
    for name, value in (
        ("PYMERGE_BACKEND", "reference"),
        ("PYMERGE_CPU_LEVEL", "portable"),
        ("PYMERGE_IO", "read"),
        ("PYMERGE_NUM_THREADS", "2"),
        ("TRITON_INTERPRET", "0"),
    ):
        monkeypatch.setenv(name, value)
    found = doctor.collect()
    assert found.bad == {} and len(found.variables) >= 5 and found.threads == "2"


@pytest.mark.parametrize("value", ["cuda", "triton"])  # --device cuda may follow
def test_a_plan_takes_a_backend_of_any_device(family, monkeypatch, value):
    monkeypatch.setenv("PYMERGE_BACKEND", value)
    assert CliRunner().invoke(commands, ["plan", str(family / "recipe.yml")]).exit_code == 0


def test_threads_that_are_given_come_first(family, monkeypatch):
    monkeypatch.setenv("PYMERGE_NUM_THREADS", "two")
    result = merge(family, "--threads", "2")
    assert result.exit_code == 0, result.stderr
    dry = merge(family, "--threads", "2", "--dry-run", "--overwrite")
    assert dry.exit_code == 0, dry.stderr
    pymerge.merge_checkpoints(family / "recipe.yml", family / "again", threads=1)
    assert merge(family, "--overwrite").exit_code == 1


@pytest.mark.parametrize("value", ["", "auto", "cpu"])
def test_the_backend_of_a_merge_may_be_named(family, monkeypatch, value):
    monkeypatch.setenv("PYMERGE_BACKEND", value)
    result = merge(family)
    assert result.exit_code == 0, result.stderr
    assert read_result(family / "out")


def test_the_way_out_of_a_backend_that_merges_no_folders(family, monkeypatch):
    monkeypatch.setenv("PYMERGE_BACKEND", "triton")
    said = "PYMERGE_BACKEND='triton' does not merge folders on the CPU; 'cpu' does, or unset it"
    assert f"{said} (on a GPU, --device cuda, 'triton' does)" in merge(family).stderr
    assert said in merge(family, "--dry-run").stderr
    with pytest.raises(DeviceError, match=r"\(on a GPU, device='cuda', 'triton' does\)"):
        pymerge.merge_checkpoints(
            recipe("linear", [family / "m1", family / "m2"], weight=1), family / "out"
        )
    monkeypatch.setenv("PYMERGE_BACKEND", "reference")
    assert "GPU" not in merge(family).stderr


def test_a_backend_that_the_environment_names_says_so(monkeypatch):
    x = torch.ones(3)
    monkeypatch.setattr(registry, "why_not", lambda name: None)
    monkeypatch.setenv("PYMERGE_BACKEND", "cuda")
    calls = (
        lambda: pymerge.ties([x]),
        lambda: pymerge.select([x]),
        lambda: peft.task_arithmetic([x], torch.ones(1)),
        lambda: pymerge.mats([torch.eye(3)], [torch.eye(3)]),
    )
    for call in calls:
        with pytest.raises(
            ValueError,
            match=(
                r"^PYMERGE_BACKEND='cuda' does not take tensors on 'cpu'; move them, or unset it$"
            ),
        ):
            call()
    with pytest.raises(ValueError, match=r"^backend 'cuda' does not take .* pass backend='auto'"):
        pymerge.ties([x], backend="cuda")
    pymerge.ties([x], backend="reference")  # the argument comes first


@pytest.mark.parametrize(
    "value, interpreted", [("1", True), ("true", True), ("ON", True), ("0", False), ("no", False)]
)
def test_triton_interpret_is_read_as_triton_reads_it(monkeypatch, value, interpreted):
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert registry.serves("triton", "cpu") is interpreted
    assert (registry.why_not("triton") is None) is (interpreted or torch.cuda.is_available())


def test_a_triton_interpret_that_triton_does_not_know_is_told(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "maybe")
    with pytest.raises(
        RuntimeError, match="'triton' is not available: TRITON_INTERPRET='maybe' is"
    ):
        pymerge.ties([torch.ones(3)], backend="triton")
