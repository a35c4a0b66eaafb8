"""What the documentation shows works: Python runs, recipes are valid, options of commands exist.

A page's blocks run in its order, in one folder and one namespace: YAML blocks that begin with
`# name.yml` are there, `pymerge plan` and `pymerge merge` are carried out, and Python finds what
stands for a reader's own models.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import yaml
from adapter_cases import adapter, write_adapter
from click.testing import CliRunner
from doc_pages import PAGES, ROOT, Block, blocks, name_of, prose
from folder_cases import family, write_model
from solve_cases import write_statistics

import pymerge
from pymerge import bench
from pymerge.cli import stats
from pymerge.cli.main import commands, mergekit_yaml
from pymerge.engine.merge import plan_checkpoints
from pymerge.methods import METHODS
from pymerge.recipe.resolve import recipe_and_notes
from pymerge.recipe.yaml import read_documents

# Pages whose recipes are planned on small models; those of others are read and checked alone, since
# they are about tokenizers, modules and other models that tensors alone are not.
PLANNED = ("README.md", "docs/quickstart.md", "docs/recipes.md", "docs/lora.md", "docs/mats.md")

PYTHON_PAGES = [page for page in PAGES if blocks(page, "python")]
RECIPES = [block for page in PAGES for block in blocks(page, "yaml")]
KINDS = ("input_gram", "output_grad_gram", "diagonal_fisher")


def values_of(data: Any, key: str) -> Iterator[Any]:
    """Whatever stands under that key, at any depth."""
    for name, value in data.items() if isinstance(data, dict) else enumerate(data):
        if name == key:
            yield value
        elif isinstance(value, (dict, list)):
            yield from values_of(value, key)


def write_inputs(recipe: dict[str, Any], folder: Path) -> None:
    """A small model in the place of every one that the recipe names, and its statistics."""
    named = dict.fromkeys(
        part
        for key in ("base_model", "model")
        for value in values_of(recipe, key)
        for part in str(value).split("+")
    )
    states = family(len(named))
    for number, (name, state) in enumerate(zip(named, states, strict=False)):
        if name.endswith("lora"):
            write_adapter(folder / name, adapter(number))
        else:
            write_model(folder / name, state)
        for entry in values_of(recipe, "models"):
            for each in entry:
                if each["model"] == name and "statistics" in each:
                    write_statistics(folder / each["statistics"], state, number, kinds=KINDS)


def whole(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe; of a part of one, a recipe with that part."""
    if "merge_method" in recipe:
        return recipe
    models = [{"model": name, "parameters": {"weight": 1}} for name in ("chat", "code")]
    return {"merge_method": "linear", "models": models, **recipe}


@pytest.mark.parametrize("block", RECIPES, ids=str)
def test_recipes_are_valid(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_documents(block.text, str(block))
    for recipe in yaml.safe_load_all(block.text):
        if name_of(block.page) in PLANNED:
            write_inputs(recipe, tmp_path)
            plan = plan_checkpoints(recipe)
            assert not plan.problems, plan.problems
            assert plan.tensors
        else:
            recipe_and_notes(whole(recipe), seed=0, non_finite="error")


def test_there_is_a_recipe_for_each_method():
    page = ROOT / "docs" / "recipes.md"
    shown = [yaml.safe_load(block.text)["merge_method"] for block in blocks(page, "yaml")]
    assert set(shown) == set(METHODS)
    headings = re.findall(r"^### `(\w+)`$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert headings == shown[: len(METHODS)]


class Classifier(torch.nn.Module):
    """With a layer of the name that docs/statistics.md asks for."""

    def __init__(self) -> None:
        super().__init__()
        layer = torch.nn.ModuleDict(
            {"output": torch.nn.ModuleDict({"dense": torch.nn.Linear(6, 3)})}
        )
        self.encoder = torch.nn.ModuleDict({"layer": torch.nn.ModuleList([layer])})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder["layer"][0]["output"]["dense"](x)


def language_models() -> list[Any]:
    """A base and two fine-tunes of it."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    models = [transformers.LlamaForCausalLM(config) for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(
            {k: t + 0.05 * torch.randn(t.shape) for k, t in models[0].state_dict().items()}
        )
    return models


def names(page: str) -> dict[str, Any]:
    """What stands for a reader's own data in the Python blocks of a page, and its files."""
    generator = torch.Generator().manual_seed(0)
    w = [torch.randn(6, 5, generator=generator) for _ in range(4)]

    def gram(size: int) -> torch.Tensor:
        rows = torch.randn(3 * size, size, generator=generator)
        return rows.T @ rows

    base, code, maths = language_models()
    ids = torch.arange(12).view(2, 6)
    found = {
        "pymerge": pymerge, "torch": torch, "base": base, "code": code, "maths": maths,
        "a": code, "b": maths, "model": base, "inputs": (ids, None, None, None, None, ids),
        "w0": w[0], "w1": w[1], "w2": w[2], "w3": w[3],
        "a1": gram(5), "a2": gram(5), "b1": gram(6), "b2": gram(6),
        "f1": w[1].abs(), "f2": w[2].abs(),
    }  # fmt: skip
    if page == "docs/statistics.md":
        torch.manual_seed(0)
        found["model"] = Classifier()
        found["batches"] = [{"x": torch.randn(4, 6), "y": torch.tensor([0, 1, 2, 0])}]
    if page == "docs/sweeps.md":
        found["ids"] = ids
    if page == "docs/coming_from.md":
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        found["model"] = peft.get_peft_model(base, config, adapter_name="code")
        found["model"].add_adapter("maths", config)
    return found


def write_files(page: str, found: dict[str, Any]) -> None:
    """The folders and files that the pages name, in the working directory."""
    for name in ("base", "code", "maths"):
        found[name].save_pretrained(Path("models") / name)
        Path(name).symlink_to(Path("models") / name)
    if page == "docs/training.md":
        vocabulary = {f"t{number}": number for number in range(32)}
        tokenizer = {"model": {"type": "WordLevel", "vocab": vocabulary}}
        Path("models/base/tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    first = next(block for block in RECIPES if block.page.name == "README.md")
    Path("recipe.yml").write_text(first.text, encoding="utf-8")
    for number, name in enumerate(("code", "maths")):
        state = found[name].state_dict()
        write_statistics(Path(f"{name}.stats.safetensors"), state, number, layers=("proj",))


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=name_of)
def test_python_runs(
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    monkeypatch.chdir(tmp_path)
    found = names(name_of(page))
    write_files(name_of(page), found)
    if name_of(page) == "docs/distributed.md":
        request.getfixturevalue("process_group")
    for block in blocks(page, "yaml"):
        if file := re.match(r"# (\w+\.yml)", block.text):
            Path(file[1]).write_text(block.text, encoding="utf-8")
    for block in blocks(page, "sh", "python"):
        if block.language == "sh":
            for words in commands_in(block.text):
                if words[:2] in (["pymerge", "plan"], ["pymerge", "merge"]):
                    result = CliRunner().invoke(commands, words[1:])
                    assert result.exit_code == 0, f"{block}: {words}: {result.output}"
        else:
            exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), found)


@pytest.fixture
def process_group() -> Iterator[None]:
    """Of this process alone."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("torch has no gloo")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def commands_in(text: str) -> Iterator[list[str]]:
    """The commands of a shell block, word by word."""
    for line in text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def shown_commands() -> list[tuple[str, list[str], bool]]:
    """(place, words, whether it is a whole command) of all that pages show."""
    found = []
    for page in PAGES:
        for block in blocks(page, "sh", ""):
            for line in block.text.splitlines():
                if line.startswith(("pymerge", "make ", "python ")):
                    found.append((str(block), shlex.split(line, comments=True), True))
        for text in re.findall(
            r"`((?:pymerge|pymerge-mergekit-yaml|make|python) [^`\n]*)`", prose(page)
        ):
            found.append((f"{name_of(page)}: {text}", shlex.split(text), False))
    return found


def command_of(words: list[str]) -> tuple[click.Command, list[str]]:
    """pymerge's command that the words call, and its arguments."""
    if words[0] == "pymerge-mergekit-yaml":
        return mergekit_yaml, words[1:]
    found: click.Command = commands
    rest = words[1:]
    while isinstance(found, click.Group) and rest and not rest[0].startswith("-"):
        if rest[0] not in found.commands:
            break
        found = found.commands[rest[0]]
        rest = rest[1:]
        found = {"bench": bench.command, "stats": stats.stats}.get(str(found.name), found)
    if found is stats.stats and rest and rest[0] not in ("-h", "--help"):
        found = stats.collect
    assert found is not commands or not rest or rest[0].startswith("-"), f"no command {rest[0]!r}"
    return found, rest


@pytest.mark.parametrize(("place", "words", "complete"), shown_commands(), ids=lambda x: None)
def test_commands_and_their_options_exist(place: str, words: list[str], complete: bool) -> None:
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        targets = [word for word in words[1:] if "=" not in word]
        assert targets
        for target in targets:
            assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), place
    elif words[0] == "python":
        if words[1] == "-m":
            assert importlib.util.find_spec(words[2]) is not None, place
        else:
            assert (ROOT / words[1]).is_file(), place
    else:
        command, arguments = command_of(words)
        options = {"--help", "-h"} if command is not commands else {"--help", "-h", "--version"}
        for parameter in command.params:
            options |= {*parameter.opts, *parameter.secondary_opts}
        for word in arguments:
            if re.match(r"-\D", word):
                assert word.partition("=")[0] in options, f"{place}: {word}"
        if complete:
            command.make_context("pymerge", arguments)
