"""mergekit-yaml's options on `pymerge merge` and `pymerge mergekit-yaml`, and files of several
recipes, as mergekit-multi reads them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from pymerge.cli.main import commands
from pymerge.engine import merge as engine

# Those of mergekit-yaml 0.1.4; 0.1.5 adds the first.
FLAGS = """
--unsafe-truncate-embeddings --no-unsafe-truncate-embeddings
--allow-crimes --no-allow-crimes --transformers-cache --lora-merge-cache --lora-merge-dtype --cuda --no-cuda --device --low-cpu-memory
--no-low-cpu-memory --out-shard-size --copy-tokenizer --no-copy-tokenizer --clone-tensors --no-clone-tensors --trust-remote-code
--no-trust-remote-code --random-seed --lazy-unpickle --no-lazy-unpickle --write-model-card --no-write-model-card --safe-serialization
--no-safe-serialization -v --quiet --no-quiet --read-to-gpu --no-read-to-gpu --multi-gpu --no-multi-gpu --num-threads -j --gpu-rich
--async-write --no-async-write --write-threads
""".split()
BOTH = ("merge", "mergekit-yaml")


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(
        commands, [str(a) for a in arguments], prog_name="pymerge", catch_exceptions=False
    )


@pytest.fixture
def family(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
        weights = {"layers.0.weight": torch.randn(16, 8, generator=generator)}
        weights |= {"layers.1.weight": torch.randn(16, 8, generator=generator)}
        save_file(weights, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text('{"model_type": "toy"}')
        (tmp_path / name / "tokenizer_config.json").write_text("{}")
        (tmp_path / name / "generation_config.json").write_text('{"top_k": 3}')
    (tmp_path / "recipe.yml").write_text(recipe(tmp_path))
    return tmp_path


def recipe(folder: Path, method: str = "dare_ties") -> str:
    return f"""
merge_method: {method}
base_model: {folder}/base
models:
  - model: {folder}/a
    parameters: {{weight: 1.0, density: 0.5}}
  - model: {folder}/b
    parameters: {{weight: 0.5, density: 0.5}}
"""


def options_of(command: str) -> set[str]:
    return {
        word
        for each in commands.commands[command].params
        for word in (*each.opts, *each.secondary_opts)
    }


@pytest.mark.parametrize("command", BOTH)
def test_no_option_of_mergekit_yaml_is_forgotten(command):
    assert len(FLAGS) == len(set(FLAGS)) == 39
    assert not set(FLAGS) - options_of(command)


@pytest.mark.parity
@pytest.mark.parametrize("command", BOTH)
def test_no_option_of_the_installed_mergekit_yaml_is_forgotten(command):
    script = pytest.importorskip("mergekit.scripts.run_yaml").main
    names = {w for p in script.params for w in (*p.opts, *p.secondary_opts) if w.startswith("-")}
    assert names <= set(FLAGS)
    assert not names - options_of(command)


WITHOUT_EFFECT = [
    "--allow-crimes",
    "--low-cpu-memory",
    "--clone-tensors",
    "--trust-remote-code",
    "--lazy-unpickle",
    "--read-to-gpu",
    "--multi-gpu",
    "--async-write",
]


@pytest.mark.parametrize("command", BOTH)
def test_what_says_how_to_compute_is_one_note(family, command):
    plain = invoke("merge", family / "recipe.yml", family / "plain", "--seed", 7)
    assert plain.exit_code == 0 and "no effect" not in plain.stderr
    flags = [*WITHOUT_EFFECT, "--write-threads", 3, "-vv", "--lora-merge-cache", family / "cache"]
    flags += ["--random-seed", 7, "-j", 2, "--transformers-cache", family / "hub"]
    result = invoke(command, family / "recipe.yml", family / "out", *flags)
    assert result.exit_code == 0, result.stderr
    (note,) = [line for line in result.stderr.splitlines() if "have no effect here" in line]
    assert note.startswith("note: --allow-crimes (architectures are not compared; tensors are")
    for flag in (*WITHOUT_EFFECT, "--write-threads", "--verbosity", "--lora-merge-cache"):
        assert flag in note
    one, other = (load_file(family / name / "model.safetensors") for name in ("plain", "out"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    quiet = invoke(command, family / "recipe.yml", family / "quiet", "--lazy-unpickle", "--quiet")
    assert quiet.output == ""


@pytest.mark.parametrize("command", BOTH)
def test_negations_of_what_has_no_effect_are_silent(family, command):
    flags = [flag.replace("--", "--no-", 1) for flag in WITHOUT_EFFECT]
    flags += ["--no-cuda", "--no-quiet", "--safe-serialization", "--no-unsafe-truncate-embeddings"]
    result = invoke(command, family / "recipe.yml", family / "out", *flags)
    assert result.exit_code == 0 and "no effect" not in result.stderr


@pytest.mark.parametrize("command", BOTH)
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--unsafe-truncate-embeddings"], "choose the tokenizer of the result"),
        (["--no-safe-serialization"], "safetensors files only; leave it out"),
        (["--lora-merge-dtype", "bfloat16"], "--lora-merge-dtype bfloat16: adapters are applied"),
        (["--trust-remote-code", "--verify"], "without running code that it brings"),
    ],
)
def test_what_would_change_the_result_is_refused(family, command, flags, said):
    result = invoke(command, family / "recipe.yml", family / "out", *flags)
    assert result.exit_code == 1 and result.stderr.startswith("error: --") and said in result.stderr
    assert not (family / "out").exists()


@pytest.mark.parametrize("command", BOTH)
@pytest.mark.parametrize(
    ("flags", "device"),
    [
        ([], "cpu"),
        (["--cuda"], "cuda"),
        (["--gpu-rich"], "cuda"),
        (["--cuda", "--device", "cuda:1"], "cuda:1"),
        (["--cuda", "--device", "cpu"], "cpu"),
    ],
)
def test_the_device(family, command, flags, device, monkeypatch):
    asked = []
    original = engine.merge_checkpoints

    def merged(*arguments, **options):
        asked.append(options.pop("device"))
        return original(*arguments, **options)

    monkeypatch.setattr(engine, "merge_checkpoints", merged)
    result = invoke(command, family / "recipe.yml", family / "out", *flags)
    assert result.exit_code == 0 and "no effect" not in result.stderr
    assert asked == [device]


@pytest.mark.parametrize("command", BOTH)
def test_tokenizer_and_card_can_be_left_out(family, command):
    flags = ["--no-copy-tokenizer", "--no-write-model-card"]
    assert invoke(command, family / "recipe.yml", family / "all").exit_code == 0
    assert invoke(command, family / "recipe.yml", family / "out", *flags).exit_code == 0
    files = [{path.name for path in (family / name).iterdir()} for name in ("all", "out")]
    assert files[0] - files[1] == {"tokenizer_config.json", "README.md"}
    text = recipe(family) + "tokenizer_source: base\n"
    (family / "recipe.yml").write_text(text)
    tokenizer = {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "added_tokens": []}
    for name in ("base", "a", "b"):
        (family / name / "tokenizer.json").write_text(json.dumps(tokenizer))
    named = invoke(command, family / "recipe.yml", family / "named", "--no-copy-tokenizer")
    assert named.exit_code == 0, named.stderr
    assert (family / "named" / "tokenizer.json").exists()


def test_a_chat_template_goes_with_the_tokenizer(family):
    text = recipe(family) + "chat_template: '{{ messages }} and some more'\n"
    (family / "recipe.yml").write_text(text)
    result = invoke("merge", family / "recipe.yml", family / "out", "--no-copy-tokenizer")
    assert result.exit_code == 0 and "chat_template is left out" in result.output
    assert not (family / "out" / "chat_template.jinja").exists()


def test_mergekit_yaml_counts_parameters_and_replaces(family):
    """Its command lines are run again and again into one folder."""
    for size, files in (("128", 2), ("128B", 1), ("1K", 1)):
        result = invoke(
            "mergekit-yaml", family / "recipe.yml", family / "out", "--out-shard-size", size
        )
        assert result.exit_code == 0, result.stderr
        assert len(list((family / "out").glob("*.safetensors"))) == files
    kept = invoke("mergekit-yaml", family / "recipe.yml", family / "out", "--no-overwrite")
    assert kept.exit_code == 1 and "is not empty" in kept.stderr
    help_text = invoke("mergekit-yaml", "--help").stdout
    assert "--gpu-rich" in help_text and "[default: 5B]" in help_text
    assert "--gpu-rich" not in invoke("merge", "--help").stdout


def test_the_console_script(family):
    script = "from pymerge.__main__ import mergekit_yaml; mergekit_yaml()"
    command = [sys.executable, "-c", script, family / "recipe.yml", family / "out", "--cuda"]
    command += ["--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (family / "out" / "model.safetensors").exists()


def stages(folder: Path, last: str = "") -> str:
    return f"""
name: one
merge_method: linear
models:
  - {{model: {folder}/a, parameters: {{weight: 1}}}}
  - {{model: {folder}/b, parameters: {{weight: 1}}}}
---
merge_method: task_arithmetic
base_model: {folder}/base
models:
  - {{model: two, parameters: {{weight: 0.5}}}}
  - {{model: {{model: {{path: one}}}}, parameters: {{weight: 0.25}}}}
{last}
---
name: two
merge_method: linear
models:
  - {{model: one, parameters: {{weight: 3}}}}
  - {{model: {folder}/base, parameters: {{weight: 1}}}}
"""


@pytest.fixture
def several(family: Path) -> Path:
    (family / "recipes.yml").write_text(stages(family))
    return family


def test_several_recipes_use_each_others_results(several):
    middle = several / "middle"
    arguments = ("merge", several / "recipes.yml", several / "out", "-I", middle)
    result = invoke(*arguments)
    assert result.exit_code == 0, result.stderr
    weights = {
        name: load_file(path / "model.safetensors")
        for name, path in {
            **{name: several / name for name in ("base", "a", "b", "out")},
            **{name: middle / name for name in ("one", "two")},
        }.items()
    }
    for name, base in weights["base"].items():
        one = (weights["a"][name] + weights["b"][name]) / 2
        two = (3 * one + base) / 4
        assert torch.allclose(weights["one"][name], one, atol=1e-6)
        assert torch.allclose(weights["two"][name], two, atol=1e-6)
        expected = base + 0.5 * (two - base) + 0.25 * (one - base)
        assert torch.allclose(weights["out"][name], expected, atol=1e-6)
    # Results that are there are taken; --no-lazy makes them anew.
    before = {name: (middle / name).stat().st_ino for name in ("one", "two")}
    again = invoke(*arguments, "--overwrite")
    assert again.exit_code == 0 and "one: taken from" in again.stderr
    assert before == {name: (middle / name).stat().st_ino for name in ("one", "two")}
    anew = invoke(*arguments, "--overwrite", "--no-lazy")
    assert anew.exit_code == 0 and "taken from" not in anew.stderr
    assert all(before[name] != (middle / name).stat().st_ino for name in before)


def test_relative_paths_are_found_from_the_files_folder(several, monkeypatch):
    text = stages(several).replace(f"{several}/", "")
    (several / "recipes.yml").write_text(text)
    elsewhere = several / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    result = invoke("merge", "../recipes.yml", "out", "--intermediate-dir", "mid@dle+x")
    assert result.exit_code == 0, result.stderr
    assert (elsewhere / "mid@dle+x" / "two" / "model.safetensors").exists()


def test_equal_problems_of_several_recipes_are_said_once(several):
    bad = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}], "dtype": "half"}
    documents = [{**bad, "name": f"s{k}"} for k in range(9)] + [{**bad, "dtype": "int8"}]
    (several / "recipes.yml").write_text(yaml.safe_dump_all(documents))
    result = invoke("merge", several / "recipes.yml", several / "out", "-I", several / "middle")
    assert result.exit_code == 1
    half = [line for line in result.stderr.splitlines() if "'half'" in line]
    assert len(half) == 1 and re.search(r"lines 1, \d+, \d+, \d+ and 5 others: dtype", half[0])
    assert result.stderr.count("'int8'") == 1


def test_a_dry_run_plans_what_it_can(several):
    arguments = ("merge", several / "recipes.yml", several / "out", "-I", several / "middle")
    result = invoke(*arguments, "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "it can be planned once the results that it uses are there" in result.stderr
    assert not (several / "middle").exists() and not (several / "out").exists()
    assert invoke(*arguments).exit_code == 0
    planned = invoke(*arguments, "--dry-run", "--overwrite")
    assert planned.exit_code == 0 and "it can be planned" not in planned.stderr


def test_a_single_named_recipe_and_an_unnamed_one(several):
    (several / "recipes.yml").write_text(recipe(several))
    arguments = ("merge", several / "recipes.yml", several / "out", "-I", several / "middle")
    assert invoke(*arguments).exit_code == 0
    assert (several / "out" / "model.safetensors").exists()


def test_an_interrupted_series_goes_on_where_it_stopped(several, monkeypatch):
    original = engine.merge_checkpoints
    done = []

    def stopped(config, out, **options):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(out)
        return original(config, out, **options)

    arguments = ("merge", several / "recipes.yml", several / "out", "-I", several / "middle")
    with monkeypatch.context() as patch:
        patch.setattr(engine, "merge_checkpoints", stopped)
        result = invoke(*arguments, "-v")
    assert result.exit_code == 130
    assert f"interrupted: {several / 'out'} is not complete. To go on from here: " in result.stderr
    words = result.stderr.rpartition("To go on from here: ")[2].split()
    assert words[0] == "pymerge" and words[-2:] != ["--resume"] and "--verbosity" in words
    again = invoke(*words[1:])
    assert again.exit_code == 0 and "one: taken from" in again.stderr
    assert (several / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text.replace("name: two", "name: one"), "line 15: the name one is taken"),
        (lambda text: text.replace("name: two\n", ""), "line 15: another recipe has no name eit"),
        (
            lambda text: text.replace("---\nmerge", "---\nname: x\nmerge"),
            "every recipe has a name,",
        ),
        (lambda text: text.replace("name: two", "name: ../two"), "'../two' is no name of a folder"),
        (lambda text: text.replace("name: two", "name: 2"), "line 15: name: 2 is no text; write"),
        (lambda text: text.replace("name: two", "name: /tmp/two"), "is no name of a folder"),
        (lambda text: text + "---\n", "a document is no recipe; remove it"),
        (lambda text: text.replace("{weight: 3}", "{wieght: 3}"), "line 18"),
    ],
)
def test_what_is_wrong_with_several_recipes_is_told_before_any_work(several, change, said):
    (several / "recipes.yml").write_text(change(stages(several)))
    arguments = ("merge", several / "recipes.yml", several / "out", "-I", several / "middle")
    result = invoke(*arguments)
    assert result.exit_code == 1 and said in result.stderr
    assert not (several / "middle").exists()


def test_recipes_that_need_each_other_are_refused(several):
    text = stages(several).replace(f"model: {several}/a", "model: two")
    (several / "recipes.yml").write_text(text)
    arguments = ("merge", several / "recipes.yml", several / "out", "-I", several / "middle")
    result = invoke(*arguments)
    assert result.exit_code == 1 and "one, two and the last use each other's" in result.stderr


@pytest.mark.parametrize("command", ["merge", "mergekit-yaml"])
def test_several_recipes_need_a_folder_for_results(several, command):
    result = invoke(command, several / "recipes.yml", several / "out")
    assert result.exit_code == 1 and "holds 3 recipes; pass --intermediate-dir" in result.stderr
    planned = invoke("plan", several / "recipes.yml")
    assert planned.exit_code == 1 and "a second YAML document begins here" in planned.stderr
    assert not (several / "out").exists()


@pytest.mark.parametrize(
    ("names", "middle"),
    [
        (("one", "./one"), "middle"),
        (("one", "one/two"), "middle"),
        (("one/two", "one"), "middle"),
        (("one", "two"), "out"),
        (("one", "two"), "out/middle"),
        (("one", "out"), "."),
    ],
)
def test_results_in_one_folder_or_within_each_other_are_refused(several, names, middle):
    text = stages(several)
    for old, new in zip(("one", "two"), names, strict=True):
        text = text.replace(f"name: {old}\n", f"name: {new}\n").replace(
            f"l: {old}\n", f"l: {new}\n"
        )
    (several / "recipes.yml").write_text(text)
    before = sorted(several.iterdir())
    result = invoke("merge", several / "recipes.yml", several / "out", "-I", several / middle)
    assert result.exit_code == 1 and "are one folder, or one lies in the other" in result.stderr
    assert sorted(several.iterdir()) == before


@pytest.mark.parametrize("options", [(), ("--overwrite",), ("--no-lazy",)])
def test_what_is_in_the_way_of_any_result_is_told_before_the_first_merge(several, options):
    for name in ("out", "middle/two"):
        (several / name).mkdir(parents=True)
        (several / name / "notes.txt").write_text("mine")
    before = sorted(several.rglob("*"))
    arguments = ("merge", several / "recipes.yml", several / "out", "-I", several / "middle")
    result = invoke(*arguments, *options)
    assert result.exit_code == 1
    assert all(
        f"output {several / name} is not " in result.stderr for name in ("out", "middle/two")
    )
    assert sorted(several.rglob("*")) == before
