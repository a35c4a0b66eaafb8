"""The command line: help, plans, merges, errors and their exit statuses, what is shown on a
terminal and elsewhere.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

import pymerge
from pymerge import __version__, bench, statistics
from pymerge.cli import terminal as _terminal
from pymerge.cli.doctor import Availability, Diagnosis, collect
from pymerge.cli.main import commands
from pymerge.cli.stats import stats
from pymerge.engine import merge
from pymerge.engine.summary import MergeSummary, MethodSummary
from pymerge.errors import MergeError
from pymerge.methods._statistics import SolveOptions
from pymerge.planning.plan import Plan, PlannedTensor, Solve
from pymerge.rules.ties import resolve_options

RECIPE = """
merge_method: ties
base_model: {folder}/base
models:
  - model: {folder}/a
    parameters: {{weight: 1.0}}
  - model: {folder}/b
    parameters: {{weight: 0.5}}
parameters:
  density: 0.25
"""


def invoke(*arguments: object) -> Result:
    """The command as a process without a terminal would run it; bugs are raised, not swallowed."""
    return CliRunner().invoke(
        commands, [str(a) for a in arguments], prog_name="pymerge", catch_exceptions=False
    )


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """A folder with recipe.yml and the model folders base, a and b: two matrices and a table of
    integers.
    """
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "a", "b"):
        tensors = {
            "layers.0.weight": torch.randn(16, 8, generator=generator),
            "layers.1.weight": torch.randn(16, 8, generator=generator),
            "position_ids": torch.arange(4),
        }
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text('{"model_type": "toy"}')
    (tmp_path / "recipe.yml").write_text(RECIPE.format(folder=tmp_path))
    return tmp_path


def damage(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors of a model folder, or take them out with None."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    for name, tensor in changes.items():
        tensors.pop(name)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, path)


def test_help_lists_every_command():
    text = invoke("--help").stdout
    for command in ("merge", "plan", "verify", "stats", "bench", "doctor"):
        assert re.search(rf"^  {command} +\w", text, re.MULTILINE), command
    assert invoke("--version").stdout.strip() == f"pymerge, version {__version__}"


@pytest.mark.parametrize("command", ["merge", "plan", "verify", "doctor", "bench", "stats"])
def test_every_command_has_help(command):
    result = invoke(command, "--help")
    assert result.exit_code == 0 and result.stdout.startswith(f"Usage: pymerge {command} ")


@pytest.mark.parametrize(
    "command",
    ["", "merge", "plan", "verify", "doctor", "bench", "stats", "stats collect", "stats merge"],
)
def test_help_is_there_by_its_short_name_and_says_what_every_option_does(command):
    short, long = (invoke(*command.split(), flag) for flag in ("-h", "--help"))
    assert short.exit_code == 0 and short.stdout == long.stdout
    options = long.stdout.partition("Options:\n")[2].partition("\nCommands:")[0]
    for entry in re.split(r"\n(?=  -)", options.rstrip()):
        words = " ".join(entry.split())
        assert re.search(r" [A-Z][a-z]+ .*(\.|\])$", words), f"{words!r} is no sentence"


def test_the_exit_statuses_are_documented():
    words = " ".join(invoke("--help").stdout.split())
    assert "The exit status is 0 when" in words and "130 after an interruption" in words


def test_merge_help_lists_the_options():
    text = invoke("merge", "--help").stdout
    options = (
        "device threads out-shard-size overwrite resume dry-run allow-non-finite seed full-paths"
        " strict verify quiet"
    )
    for option in options.split():
        assert f"--{option}" in text


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["merge"],
        ["merge", "recipe.yml"],
        ["merge", "recipe.yml", "out", "--no-such-option"],
        ["merge", "recipe.yml", "out", "--threads", "-1"],
        ["merge", "recipe.yml", "out", "--seed", "-1"],
        ["merge", "recipe.yml", "out", "--out-shard-size", "five"],
        ["merge", "recipe.yml", "out", "--out-shard-size", "5G"],
        ["merge", "recipe.yml", "out", "--device-memory", "4B"],
        ["merge", "recipe.yml", "out", "--seed", str(2**64)],
    ],
)
def test_wrong_usage_exits_with_2(arguments):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr or "Error:" in result.stderr


def every_option(group: click.Group) -> Iterator[tuple[click.Command, click.Option]]:
    for command in group.commands.values():
        if isinstance(command, click.Group):
            yield from every_option(command)
        else:
            yield from (
                (command, each) for each in command.params if isinstance(each, click.Option)
            )


@pytest.mark.parametrize("text", ["\u0663", "\uff13", "1_0", "3.0", "0x3", "3\u00b2"])
def test_numbers_are_of_the_digits_0_to_9(text):
    own = commands, click.Group(commands=[stats, bench.command])
    numbers = [
        (command, option)
        for group in own
        for command, option in every_option(group)
        if (option.metavar and option.type.name.startswith("integer") and not option.count)
        or option.opts[0] in ("--rank", "--out-shard-size", "--memory-limit", "--models", "--size")
    ]
    assert len(numbers) > 20
    for command, option in numbers:
        if text == "3.0" and option.type.name == "text":  # of which some take fractions
            continue
        with pytest.raises(click.BadParameter):
            option.process_value(click.Context(command), text)


def test_merge_writes_the_folder_and_says_where(family):
    result = invoke("merge", family / "recipe.yml", family / "out")
    assert result.exit_code == 0, result.output
    merged = load_file(family / "out" / "model.safetensors")
    assert merged.keys() == load_file(family / "base" / "model.safetensors").keys()
    assert "\x1b" not in result.output, "no escape codes without a terminal"
    last = result.stdout.strip().splitlines()[-1]
    assert str(family / "out") in last and "260 parameters" in last
    row = next(line for line in result.stdout.splitlines() if line.strip().startswith("ties"))
    assert re.search(r"ties\s+2\s+256\s+25\.0 %", row), row


def test_quiet_prints_nothing(family):
    result = invoke("merge", family / "recipe.yml", family / "out", "--quiet")
    assert result.exit_code == 0 and result.output == ""
    assert (family / "out").is_dir()


def test_plan_and_dry_run_write_nothing(family):
    before = sorted(family.rglob("*"))
    for result in (
        invoke("plan", family / "recipe.yml"),
        invoke("merge", family / "recipe.yml", family / "out", "--dry-run"),
    ):
        assert result.exit_code == 0
        row = next(line for line in result.stdout.splitlines() if " ties " in line)
        assert "density 0.25, weight 1/0.5" in row and "float32" in row and "256" in row
    assert sorted(family.rglob("*")) == before


def test_a_plan_marks_the_base_and_numbers_the_models_as_their_weights(family):
    lines = invoke("plan", family / "recipe.yml").stdout.splitlines()
    assert lines[:4] == [
        "merge_method: ties",
        f"base_model: {family}/base",
        f"model 1: {family}/a",
        f"model 2: {family}/b",
    ]
    assert any("density 0.25, weight 1/0.5" in line for line in lines)
    recipe = family / "linear.yml"
    entries = ((name, weight) for name, weight in (("b", 2), ("base", 1), ("a", 3)))
    listed = "\n".join(
        f"  - {{model: {family}/{name}, parameters: {{weight: {weight}}}}}"
        for name, weight in entries
    )
    recipe.write_text(
        f"merge_method: linear\nbase_model: {family}/base\nparameters: {{normalize:"
        f" false}}\nmodels:\n{listed}\n"
    )
    text = invoke("plan", recipe).stdout
    assert text.startswith(
        f"merge_method: linear\nmodel 1: {family}/b\nmodel 2: {family}/base (base_model)\nmodel 3:"
        f" {family}/a\n"
    )
    assert "weight 2/1/3, normalize false" in text


def test_what_is_empty_is_not_shown(family):
    text = invoke("merge", family / "recipe.yml", family / "out").stdout
    assert "not finite" not in text and "sign conflicts" in text and "0.00" not in text
    damage(family / "a", **{"layers.0.weight": None})
    result = invoke("plan", family / "recipe.yml")
    assert result.exit_code == 1 and "tensors" not in result.stdout and "reads" not in result.stdout
    assert f"base_model: {family}/base" in result.stdout


def test_names_are_not_cut_where_the_output_goes_to_a_file(family):
    name = "transformer." + 40 * "very_" + "long.weight"
    for model in ("base", "a", "b"):
        damage(family / model, **{"layers.0.weight": None})
        path = family / model / "model.safetensors"
        save_file(load_file(path) | {name: torch.zeros(2)}, path)
    assert f"{name} [2]" in invoke("plan", family / "recipe.yml", "--tensors").stdout


def test_plan_lists_every_tensor_where_asked(family):
    text = invoke("plan", family / "recipe.yml", "--tensors").stdout
    assert "layers.0.weight [16, 8]" in text and "layers.1.weight [16, 8]" in text


def test_every_problem_is_listed_before_any_work(family):
    damage(family / "a", **{"layers.0.weight": None})
    damage(family / "b", **{"layers.1.weight": torch.zeros(4, 4)})
    for command in (["plan"], ["merge", "--dry-run"], ["merge"]):
        out = [family / "out"] if command[0] == "merge" else []
        result = invoke(command[0], family / "recipe.yml", *out, *command[1:])
        assert result.exit_code == 1
        assert "layers.0.weight" in result.stderr and "layers.1.weight" in result.stderr
        assert "[4, 4]" in result.stderr and "Traceback" not in result.output
    assert not (family / "out").exists()


def test_a_recipe_that_is_wrong_gets_a_message(family):
    recipe = family / "recipe.yml"
    recipe.write_text(recipe.read_text().replace("density: 0.25", "density: 20"))
    result = invoke("merge", recipe, family / "out")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") and "pass 0.2" in result.stderr
    assert invoke("merge", family / "nowhere.yml", family / "out").exit_code == 1
    assert not (family / "out").exists()


def test_an_output_that_exists_is_kept_unless_told_otherwise(family):
    out = family / "out"
    out.mkdir()
    (out / "precious.txt").write_text("keep me")
    result = invoke("merge", family / "recipe.yml", out)
    assert result.exit_code == 1 and "--overwrite" in result.stderr
    assert (out / "precious.txt").read_text() == "keep me"
    result = invoke("merge", family / "recipe.yml", out, "--overwrite")
    assert result.exit_code == 1 and "not a model folder" in result.stderr
    assert (out / "precious.txt").read_text() == "keep me"
    (out / "model.safetensors").write_text("old")
    result = invoke("merge", family / "recipe.yml", out, "--overwrite")
    assert result.exit_code == 1 and "holds what no merge writes: precious.txt" in result.stderr
    (out / "precious.txt").unlink()
    assert invoke("merge", family / "recipe.yml", out, "--overwrite").exit_code == 0
    assert (out / "model.safetensors").read_bytes() != b"old"


def test_an_output_whose_name_is_not_utf_8(family):
    """The summary is printed when the model is there: it must not fail, whatever the terminal's
    encoding.
    """
    for encoding in ("utf-8:strict", "ascii:strict"):
        out = os.fsdecode(b"out\xfd" + encoding[:1].encode())
        command = [sys.executable, "-m", "pymerge", "merge", "recipe.yml", out]
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        done = subprocess.run(command, cwd=family, env=environment, capture_output=True, check=True)
        assert b"the merged model is in" in done.stdout and rb"out\udcfd" in done.stdout
        assert (family / out / "model.safetensors").exists()


def test_errors_name_the_options_and_python_its_arguments(family):
    out = family / "out"
    recipe, given = family / "recipe.yml", {"device_memory": "1GB"}
    result = invoke("merge", recipe, out, "--device-memory", "1GB")
    assert "--device-memory 1GB is for a GPU; pass --device cuda too" in result.stderr
    with pytest.raises(
        MergeError, match=r"^device_memory='1GB' is for a GPU; pass device='cuda' too"
    ):
        pymerge.merge_checkpoints(recipe, out, **given)
    for command in (["merge", recipe, out], ["stats", "collect", "model", "texts", "--out", out]):
        result = invoke(*command, "--device", "tpu")
        assert "Invalid value for '--device': 'tpu' is not one of 'cpu', 'cuda'," in result.stderr
        assert result.exit_code == 2
    result = invoke("merge", recipe, out, "--out-shard-size", "five")
    assert "Invalid value for '--out-shard-size': 'five' is not a size" in result.stderr
    result = invoke("merge", recipe, out, "--out-shard-size", "5 KB", "--dry-run")
    assert result.exit_code == 0
    result = invoke("merge", recipe, out, "--out-shard-size", "0.1 KB")
    assert "--out-shard-size '0.1 KB' is less than 2 of the 3 tensors have" in result.stderr
    assert result.exit_code == 1 and not out.exists()
    assert invoke("merge", recipe, out, "--out-shard-size", "5B", "--quiet").exit_code == 0
    result = invoke("merge", recipe, out)
    assert "pass --overwrite to replace it" in result.stderr and "overwrite=" not in result.stderr
    with pytest.raises(MergeError, match="pass overwrite=True to replace") as error:
        pymerge.merge_checkpoints(recipe, out)
    assert "--" not in str(error.value)


def test_nan_is_named_and_can_be_let_through(family):
    bad = torch.zeros(16, 8)
    bad[3, 4] = torch.nan
    damage(family / "b", **{"layers.1.weight": bad})
    result = invoke("merge", family / "recipe.yml", family / "out")
    assert result.exit_code == 1
    assert "layers.1.weight" in result.stderr and str(family / "b") in result.stderr
    assert "let them through (--allow-non-finite)" in result.stderr
    assert not (family / "out").exists()
    result = invoke("merge", family / "recipe.yml", family / "out", "--allow-non-finite")
    assert result.exit_code == 0
    row = next(line for line in result.stdout.splitlines() if line.strip().startswith("ties"))
    assert row.split()[-1] == "1"
    merged = load_file(family / "out" / "model.safetensors")["layers.1.weight"]
    assert merged.isnan().nonzero().tolist() == [[3, 4]]


def test_an_interruption_says_how_to_go_on(family, monkeypatch):
    left = True

    def interrupted(config: object, out: Path, **options: object) -> None:
        partial = out.with_name(f".{out.name}.pymerge-partial")
        if left:
            partial.mkdir()
            (partial / "pymerge_manifest.json").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(merge, "merge_checkpoints", interrupted)
    result = invoke("merge", family / "recipe.yml", family / "out put")
    assert result.exit_code == 130
    assert f"pymerge merge {family}/recipe.yml '{family}/out put' --resume\n" in result.stderr
    options = "--device-memory 1GB --out-shard-size 1MB --overwrite --allow-non-finite --seed 5 --quiet".split()
    result = invoke("merge", family / "recipe.yml", family / "out", "--resume", *options)
    assert f"{family}/out --resume {' '.join(options)}\n" in result.stderr
    left = False
    result = invoke("merge", family / "recipe.yml", family / "other")
    assert result.exit_code == 130
    assert "nothing was left behind" in result.stderr and "--resume" not in result.stderr


def test_a_failing_disk_is_an_error_and_a_bug_is_a_traceback(family, monkeypatch):
    def fail(error: Exception) -> Result:
        def raising(*arguments: object, **options: object) -> None:
            raise error

        monkeypatch.setattr(merge, "merge_checkpoints", raising)
        return invoke("merge", family / "recipe.yml", family / "out")

    result = fail(OSError(5, "Input/output error", "/disk/file"))
    assert result.exit_code == 1 and result.stderr == "error: /disk/file: Input/output error\n"
    result = fail(RuntimeError("PYMERGE_CPU_LEVEL='avx9' is not one of 'avx2'"))
    assert result.exit_code == 1 and result.stderr.startswith("error: PYMERGE_CPU_LEVEL")
    for bug in (ZeroDivisionError(), ValueError("x"), RuntimeError("y")):
        with pytest.raises(type(bug)):
            fail(bug)


def test_warnings_are_shown_as_notes(family, monkeypatch):
    def warning(*arguments: object, **options: object) -> None:
        warnings.warn("something has no effect", stacklevel=2)
        raise KeyboardInterrupt

    monkeypatch.setattr(merge, "plan_checkpoints", warning)
    assert "note: something has no effect\n" in invoke("plan", family / "recipe.yml").stderr


def test_plan_takes_what_merge_takes_of_the_plan(family):
    assert invoke("plan", family / "recipe.yml", "--seed", "3", "--quiet").stdout == ""
    assert invoke("plan", family / "recipe.yml", "--seed", "-1").exit_code == 2
    assert pymerge.plan_checkpoints(family / "recipe.yml").problems == ()


def test_doctor_reports_every_op_and_backend():
    result = invoke("doctor")
    assert result.exit_code == 0
    diagnosis = collect()
    assert Path(diagnosis.location) == Path(pymerge.__file__).parent
    assert {(e.op, e.backend) for e in diagnosis.backends} >= {
        (op, backend)
        for op in ("ties", "select")
        for backend in ("reference", "cpu", "cuda", "triton")
    }
    assert "torch" in result.stdout and "threads" in result.stdout
    assert re.search(r"^mats \(cg\) +cpu +available$", result.stdout, re.MULTILINE)
    assert re.search(r"^ties +reference +available$", result.stdout, re.MULTILINE)
    assert re.search(r"^ties +cpu +available$", result.stdout, re.MULTILINE)
    assert diagnosis.cpu_level in diagnosis.cpu_levels and diagnosis.cpu_levels["portable"]


def test_doctor_says_why_not():
    diagnosis = Diagnosis(
        versions={"pymerge": "1", "torch": None},
        location="/somewhere",
        system="Linux",
        processor="a processor",
        cpu_levels={"portable": True, "avx2": True, "avx512": False},
        cpu_level="avx2",
        threads="2",
        devices=(),
        variables={"PYMERGE_CPU_LEVEL": "avx2"},
        backends=(Availability("ties", "cpu", None), Availability("ties", "cuda", "no device")),
    )
    text = diagnosis.text()
    assert re.search(r"^torch +not installed$", text, re.MULTILINE)
    assert "portable, avx2 (in use), avx512 (not on this processor)" in text
    assert re.search(r"^ties +cuda +not available: no device$", text, re.MULTILINE)
    assert "none that torch sees" in text and "avx2 (environment)" in text


def test_doctor_without_torch(monkeypatch):
    """Folders are merged without it; what takes tensors is not there."""
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "pymerge.backends.cg.iteration", raising=False)
    found = {(each.op, each.backend): each.reason for each in collect().backends}
    assert found["ties", "cpu"] is None
    assert "torch" in str(found["ties", "reference"]) and "torch" in str(found["ties", "triton"])


def test_doctor_works_where_the_extension_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "pymerge.backends.native", None)
    monkeypatch.delattr("pymerge.backends.native", raising=False)
    diagnosis = collect()
    assert diagnosis.cpu_levels == {} and diagnosis.cpu_level.startswith("none: ")
    reasons = {e.backend: e.reason for e in diagnosis.backends}
    assert reasons["reference"] is None and reasons["cpu"] is not None


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (999, "999 B"),
        (4096, "4.1 kB"),
        (99_949, "99.9 kB"),
        (99_960, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.0 MB"),
        (16.1e9, "16.1 GB"),
        (2e15, "2000 TB"),
    ],
)
def test_amounts_of_bytes(count, text):
    assert _terminal.amount(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.08, "0.08 s"), (4.72, "4.7 s"), (47.4, "47 s"), (59.7, "1 min 00 s"), (7800, "2 h 10 min")],
)
def test_durations(seconds, text):
    assert _terminal.duration(seconds) == text


def console(terminal: bool, width: int = 100) -> tuple[_terminal.Screen, io.StringIO]:
    file = io.StringIO()
    return _terminal.Screen(file=file, force_terminal=terminal, width=width), file


@pytest.mark.parametrize("each", [False, True])
def test_tables_fit_a_page_where_there_is_no_terminal(each):
    """But for names of tensors, which are searched for."""
    options = resolve_options(2, density=[0.5, 0.6], weights=[0.1, 0.2], scaling=0.75)
    name = "model." + "long_part." * 12 + "weight"
    tensor = PlannedTensor(
        name=name,
        shape=(4, 4),
        dtype="bfloat16",
        method="ties",
        sources=(),
        base=None,
        options=options,
        key_name=name,
        non_finite="error",
    )
    plan = Plan(models=("a",), tensors=(tensor,), bytes_read=1, notes=(), problems=())
    shown, file = console(terminal=False, width=1000)
    _terminal.show_plan(plan, shown, each=each)
    table = file.getvalue().splitlines()[:-1]
    assert (max(map(len, table)) <= 80) != each
    assert (name in file.getvalue()) == each


@pytest.mark.parametrize("value", ["1", ""])
def test_no_color_is_no_bold_either(monkeypatch, value):
    monkeypatch.setenv("NO_COLOR", value)
    monkeypatch.setenv("TERM", "xterm")
    shown, file = console(terminal=True)
    shown.print("[bold]a[/bold]")
    assert ("\x1b" in file.getvalue()) == (not value)


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch):
    clock = iter([0.0, 1.0, 11.0, 12.0, 22.0])
    monkeypatch.setattr(_terminal.time, "monotonic", lambda: next(clock))
    shown, file = console(terminal=False)
    with _terminal.progress(shown) as advance:
        assert advance is not None
        for done in (1, 11, 12, 22):
            advance(done * 10**9, 44 * 10**9, "x")
    assert file.getvalue().splitlines() == [
        "11.0 GB of 44.0 GB, 1.0 GB/s, 33 s left",
        "22.0 GB of 44.0 GB, 1.0 GB/s, 22 s left",
    ]


def test_the_time_left_is_told_from_a_hundredth_on(monkeypatch):
    clock = iter([0.0, 10.0, 20.0])
    monkeypatch.setattr(_terminal.time, "monotonic", lambda: next(clock))
    shown, file = console(terminal=False)
    with _terminal.progress(shown) as advance:
        assert advance is not None
        advance(12_300, 10**9, "x")
        advance(10**7, 10**9, "x")
    first, second = file.getvalue().splitlines()
    assert first == "12.3 kB of 1.0 GB, 1.2 kB/s"
    assert second == "10.0 MB of 1.0 GB, 500 kB/s, 33 min 00 s left"


def test_progress_on_a_terminal_is_a_bar_with_speed():
    shown, file = console(terminal=True)
    with _terminal.progress(shown) as advance:
        assert advance is not None
        advance(5 * 10**9, 10 * 10**9, "x")
    assert "5.0/10.0 GB" in file.getvalue() and "\x1b" in file.getvalue()


def test_progress_is_silent_if_quiet():
    shown, file = console(terminal=True)
    with _terminal.progress(shown, quiet=True) as advance:
        assert advance is None
    assert file.getvalue() == ""


def test_a_plan_of_many_settings_is_cut_short_but_counts_all():
    tensors = [
        PlannedTensor(
            name=f"layers.{i}.weight",
            shape=(10, 10),
            dtype="float16",
            method="ties",
            sources=(),
            base=None,
            options=resolve_options(2, density=(i + 1) / 100, weights=[1, 0.5], scaling=1.3),
            key_name="",
        )
        for i in range(40)
    ]
    shown, file = console(terminal=False)
    shown.print(_terminal.plan_table(tensors))
    text = file.getvalue()
    assert text.count("weight 1/0.5, lambda 1.3") == _terminal.MOST_GROUPS - 1
    assert "29 more combinations" in text
    assert text.strip().splitlines()[-1].split() == ["40", "4,000", "8.0", "kB"]


def test_the_summary_shows_counts_speed_and_place():
    counted = MethodSummary(
        tensors=3, elements=1000, considered=2000, kept=500, conflicts=100, non_finite=7
    )
    summary = MergeSummary(
        out=Path("merged"),
        files=("a", "b"),
        tensors=4,
        parameters=1004,
        bytes_read=3 * 10**9,
        bytes_written=10**9,
        seconds=2.0,
        resumed=1,
        methods={"ties": counted, "copy": MethodSummary(tensors=1, elements=4)},
        notes=("a [bold]note[/bold]",),
    )
    shown, file = console(terminal=False)
    _terminal.show_summary(summary, shown)
    lines = file.getvalue().splitlines()
    assert lines[0] == "note: a [bold]note[/bold]"
    assert any(re.search(r"ties +3 +1,000 +25\.0 % +10\.0 % +7", line) for line in lines)
    assert any(re.search(r"copy +1 +4 +copied", line) for line in lines)
    assert lines[-3].startswith("1 of 2 files was taken over")
    assert lines[-2] == "read 3.0 GB, wrote 1.0 GB in 2.0 s (2.0 GB/s)"
    assert lines[-1] == "the merged model is in merged (1,004 parameters, 2 files)"


@pytest.mark.parametrize("name", ["results.json", "results.csv"])
def test_bench_replaces_only_its_own_results(tmp_path, monkeypatch, name):
    from pymerge import bench

    out = tmp_path / "results"
    monkeypatch.setattr(bench, "run", lambda *_: ([], []))
    arguments = ["--out", str(out)]
    for _ in range(2):  # the second time over its own files
        assert CliRunner().invoke(bench.command, arguments).exit_code == 0
    (tmp_path / name).write_text("mine")
    result = CliRunner().invoke(bench.command, arguments)
    assert result.exit_code == 2 and f"{name} exists and holds no results" in result.stderr
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize(
    "command",
    [
        "plan {} --tensors",
        "merge {} out",
        "--help",
        *(
            pytest.param(command, marks=pytest.mark.slow)
            for command in (
                "plan --help",
                "stats --help",
                "bench --size 1K --models 2 --family fp32 --repeats 1",
                "stats show t --tensors",
                "doctor",
                "bench --help",
            )
        ),
    ],
)
def test_a_reader_that_goes_away_is_silence(family, command):
    words = command.format("recipe.yml").split()
    if "show" in words:
        model = torch.nn.Linear(2, 2)
        statistics.collect(model, [torch.ones(1, 2)], kinds=("input_gram",), out=family / "t")
    reading, writing = os.pipe()
    os.close(reading)
    call = [sys.executable, "-m", "pymerge", *words]
    try:
        done = subprocess.run(call, cwd=family, stdout=writing, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writing)
    assert done.returncode == 141 and "ipe" not in done.stderr and "error" not in done.stderr


@pytest.mark.parametrize(
    ("options", "said", "unsaid"),
    [
        ({"solver": "exact", "iterations": 1000000, "damping": 1}, "solver exact", "iterations"),
        ({"solver": "exact", "step_limit": 2.0}, "solver exact", "step_limit"),
        ({"solver": "cg", "iterations": 7, "damping": 1}, "iterations 7, damping 1", "solver"),
        ({"solver": "cg", "damping": 1}, "iterations 5, damping 1", "solver"),
        ({"solver": "cg", "flavor": "paper"}, "iterations 100, flavor paper", "solver"),
    ],
)
def test_a_plan_shows_what_counts_for_the_solver(options, said, unsaid):
    given = tuple(({"flavor": "default"} | options).items())
    solve = Solve(SolveOptions("mats", "average", (), given, None), (None,), None, False, "")
    told = _terminal.solve_settings(solve)
    assert said in told and unsaid not in told and "init average" in told


@pytest.mark.parametrize(("variable", "threads"), [(None, None), ("3", 3)])
def test_bench_takes_all_threads_for_0(monkeypatch, variable, threads):
    from pymerge import bench
    from pymerge.backends import native

    taken = []
    monkeypatch.setattr(bench, "run", lambda *_: ([], []))
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.delenv("PYMERGE_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("PYMERGE_NUM_THREADS", variable)
    small = ["--size", "1K", "--models", "2", "--threads", "0"]
    assert CliRunner().invoke(bench.command, small).exit_code == 0
    assert taken == [threads or native.num_threads()]
    monkeypatch.setenv("PYMERGE_NUM_THREADS", "many")
    result = CliRunner().invoke(bench.command, small)
    assert result.exit_code == 1 and "PYMERGE_NUM_THREADS='many' is not" in result.stderr


def test_another_pipe_that_breaks_is_an_error(family, monkeypatch):
    def fail(*arguments: object, **options: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(merge, "plan_checkpoints", fail)
    result = invoke("plan", family / "recipe.yml")
    assert (result.exit_code, result.stderr) == (1, "error: Broken pipe\n")
