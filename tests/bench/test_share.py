"""`pymerge bench --share`: the JSON of a bug report, and `pymerge doctor`'s list of what to install."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from pymerge import bench
from pymerge.backends import native, registry
from pymerge.bench import machine, results
from pymerge.bench.results import Row
from pymerge.cli import doctor

ROW = Row("ties", "ties", "fp32", 2, 1024, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
PEER = {
    "peer": "peft", "merge": "ties", "family": "fp32", "models": 2, "n": 1024, "ms_p50": 4.0,
    "pymerge_ms_p50": 2.0, "ratio": 2.0,
}  # fmt: skip


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(bench, "run", lambda *_: ([ROW], [PEER]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("words", [["--share"], ["--share", "mine.json"], ["--share=mine.json"]])
def test_a_report_says_what_was_measured_and_where(measured: Path, words: list[str]) -> None:
    for _ in range(2):  # the second time over its own file
        done = CliRunner().invoke(bench.command, words)
        assert done.exit_code == 0, done.output
    name = "mine.json" if "mine" in words[-1] else "pymerge-bench.json"
    assert f"{name} can go into a bug report" in done.stderr
    (path,) = measured.iterdir()
    assert path.name == name
    found = json.loads(path.read_text())
    assert found["rows"] == [vars(ROW)] and found["peers"] == [PEER]
    assert found["machine"]["cpu_level"] == native.cpu_level()
    assert found["machine"]["memory_gib"] > 0 and found["machine"]["usable_cpus"] >= 1
    assert found["versions"]["torch"] and found["backends"].keys() == set(registry.BACKENDS)


def test_a_report_tells_of_no_person(measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/srv/people/somebody")
    monkeypatch.setattr(platform, "node", lambda: "a-host")
    monkeypatch.setenv("COMMIT", "/srv/people/somebody/checkout")
    monkeypatch.setattr(machine, "_commit", lambda: "")
    monkeypatch.setattr(
        registry,
        "why_not",
        lambda name: f"'/srv/people/somebody/lib/_{name}.so' of somebody on a-host: no symbol",
    )
    assert CliRunner().invoke(bench.command, ["--share"]).exit_code == 0
    text = (measured / "pymerge-bench.json").read_text()
    assert "'_cpu.so' of ... on ...: no symbol" in text
    for word in ("somebody", "people", "srv", "a-host", str(measured), str(Path.cwd())):
        assert word not in text


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/home/x/y.so: no", "y.so: no"),
        ("in ~/models/a", "in a"),
        ("../up/there", "there"),
        ("C:\\Users\\x\\y.dll", "y.dll"),
        ('"/a/b"', '"b"'),
        ("12 GB/s, and/or", "12 GB/s, and/or"),
        ("Linux 6.1 x86_64", "Linux 6.1 x86_64"),
    ],
)
def test_folders_are_left_out(text: str, left: str) -> None:
    assert results.without_places({"a": [text, 1, None]}) == {"a": [left, 1, None]}


def test_no_other_file_is_replaced(measured: Path) -> None:
    (measured / "mine.json").write_text("{}")
    done = CliRunner().invoke(bench.command, ["--share", "mine.json"])
    assert done.exit_code == 2 and "mine.json exists and holds no results" in done.stderr
    assert (measured / "mine.json").read_text() == "{}"
    done = CliRunner().invoke(bench.command, ["--share", "--cache"])
    assert done.exit_code == 2 and "'--share'" in done.stderr


def test_doctor_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = machine._version
    missing = {"peft", "triton", "rich", "matplotlib", "transformers"}
    monkeypatch.setattr(machine, "_version", lambda name: None if name in missing else usual(name))
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(native, "load", lambda: SimpleNamespace(with_cuda=False))
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    told = dict(machine.to_install())
    assert told["pip install rich"] == "pymerge itself"
    assert "on a GPU" in told["pip install triton"]
    assert "pymerge verify" in told["pip install transformers"]
    assert "pip install peft" in told and "pip install matplotlib" in told
    assert "pip install numpy" not in told
    (cuda,) = [command for command in told if "PYMERGE_CUDA=1 pip install" in command]
    assert cuda.startswith("NVIDIA's CUDA toolkit, for nvcc, and then ")
    monkeypatch.setattr(machine.shutil, "which", lambda name: "/usr/bin/nvcc")
    assert any(command.startswith("PYMERGE_CUDA=1") for command, _ in machine.to_install())
    monkeypatch.setattr(native, "load", lambda: SimpleNamespace(with_cuda=True))
    assert not any("CUDA" in command for command, _ in machine.to_install())
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    assert "pip install triton" not in dict(machine.to_install())


def test_doctor_shows_it_where_something_is_missing() -> None:
    parts = dict.fromkeys(("location", "system", "processor", "cpu_level", "threads"), "")
    given = {**parts, "versions": {}, "cpu_levels": {}, "devices": (), "variables": {}}
    one = (("pip install peft", "adapters"),)
    text = doctor.Diagnosis(**given, backends=(), to_install=one).text()
    assert text.endswith("what could be installed, and for what\n  pip install peft  # adapters")
    assert "installed" not in doctor.Diagnosis(**given, backends=()).text()


@pytest.mark.parametrize("name", ["", ".", "..", "x/..", "/"])
@pytest.mark.parametrize("option", ["--out", "--share"])
def test_what_names_no_file_is_wrong_usage(measured: Path, option: str, name: str) -> None:
    done = CliRunner().invoke(bench.command, [f"{option}={name}"])
    assert done.exit_code == 2 and option in done.stderr
    assert list(measured.iterdir()) == []


@pytest.mark.parametrize("name", ["x.json", "./x.json", "x.csv"])
def test_a_report_is_no_file_of_the_results(measured: Path, name: str) -> None:
    done = CliRunner().invoke(bench.command, ["--out", "x", "--share", name])
    assert done.exit_code == 2 and "--share" in done.stderr
    assert list(measured.iterdir()) == []
