"""The chat template of a result: a text, a name, a path, or the one that most models have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from folder_cases import recipe, write_family

from pymerge.engine.merge import merge_checkpoints, plan_checkpoints
from pymerge.errors import CheckpointError, ConfigError
from pymerge.recipe.chat_templates import NAMED

ONE = "{% for m in messages %}one {{ m.content }}{% endfor %}"
TWO = "{% for m in messages %}two {{ m.content }}{% endfor %}"
NEW = "{% for m in messages %}new {{ m.content }}{% endfor %}"


def configured(folders: list[Path], template: Any, **more: Any) -> dict[str, Any]:
    return {**recipe("ties", folders, density=0.5), "chat_template": template, **more}


def give(folder: Path, template: str | None, where: str) -> None:
    """A template in one of the places where transformers looks for it."""
    config: dict[str, Any] = {"eos_token": "</s>"}
    if template is not None and where == "file":
        (folder / "chat_template.jinja").write_text(template)
        config["chat_template"] = "an older one, which does not count: {{ messages }}"
    elif template is not None:
        named = [{"name": "tool_use", "template": NEW}, {"name": "default", "template": template}]
        config["chat_template"] = template if where == "config" else named
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def template_of(folder: Path) -> str | None:
    path = folder / "chat_template.jinja"
    return path.read_text() if path.exists() else None


@pytest.mark.parametrize("where", ["file", "config", "several"])
@pytest.mark.parametrize(
    ("having", "wanted"),
    [
        ((ONE, TWO, f"\n{TWO}  "), TWO),
        ((ONE, TWO, NEW), ONE),
        ((None, TWO, ONE), TWO),
        ((" ", None, ONE), ONE),
    ],
)
def test_the_commonest(
    tmp_path: Path, having: tuple[str | None, ...], wanted: str, where: str
) -> None:
    folders = write_family(tmp_path)
    for folder, template in zip(folders, having, strict=True):
        give(folder, template, where)
    summary = merge_checkpoints(configured(folders, "auto"), tmp_path / "out")
    assert template_of(tmp_path / "out") == wanted
    different = {each.strip() for each in having if each and each.strip()}
    told = "chat_template: auto: that of" in "\n".join(summary.notes)
    assert told == (len(different) > 1)


def test_none_has_one(tmp_path: Path) -> None:
    folders = write_family(tmp_path)
    for folder in folders:
        give(folder, None, "config")
    summary = merge_checkpoints(configured(folders, "auto"), tmp_path / "out")
    assert template_of(tmp_path / "out") is None
    assert "chat_template: auto: none of the models has a template" in summary.notes
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config == {"eos_token": "</s>"}


def test_the_model_of_the_tokenizer_alone_is_not_counted(tmp_path: Path) -> None:
    folders = write_family(tmp_path, 3)
    for folder, template in zip(folders, (ONE, TWO, None, ONE), strict=True):
        give(folder, template, "file")
        words = {f"w{i}": i for i in range(37)}
        content = {"added_tokens": [], "model": {"type": "BPE", "vocab": words, "merges": []}}
        (folder / "tokenizer.json").write_text(json.dumps(content))
    config = configured(folders[1:3], "auto", tokenizer_source=str(folders[3]))
    merge_checkpoints(config, tmp_path / "out")
    assert template_of(tmp_path / "out") == TWO


def test_links_out_of_a_folder_are_not_read(tmp_path: Path) -> None:
    folders = write_family(tmp_path)
    (tmp_path / "secret").write_text(TWO)
    for folder in folders[1:]:
        (folder / "chat_template.jinja").symlink_to(tmp_path / "secret")
    summary = merge_checkpoints(configured(folders, "auto"), tmp_path / "out")
    assert template_of(tmp_path / "out") is None
    assert sum("link out of the folder" in note for note in summary.notes) == 2


@pytest.mark.parametrize("what", ["bytes", "json", "folder"])
def test_damaged_ones(tmp_path: Path, what: str) -> None:
    folders = write_family(tmp_path)
    if what == "bytes":
        (folders[2] / "chat_template.jinja").write_bytes(b"{{ \xff }}")
    elif what == "json":
        (folders[2] / "tokenizer_config.json").write_text("{")
    else:
        (folders[2] / "chat_template.jinja").mkdir()
    with pytest.raises(CheckpointError, match=str(folders[2])):
        merge_checkpoints(configured(folders, "auto"), tmp_path / "out")
    merge_checkpoints(configured(folders, NEW), tmp_path / "out")


@pytest.mark.parametrize("name", NAMED)
def test_names(tmp_path: Path, name: str) -> None:
    folders = write_family(tmp_path)
    merge_checkpoints(configured(folders, name), tmp_path / "out")
    assert template_of(tmp_path / "out") == NAMED[name]


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the working directory, else from the recipe's folder."""
    import yaml

    folders = write_family(tmp_path)
    (tmp_path / "mine.jinja").write_text(NEW)
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(configured(folders, "mine.jinja")))
    merge_checkpoints(tmp_path / "recipe.yml", tmp_path / "out")
    assert template_of(tmp_path / "out") == NEW
    with pytest.raises(ConfigError, match=r"'mine\.jinja' is neither auto, nor one of alpaca"):
        plan_checkpoints(configured(folders, "mine.jinja"))
    monkeypatch.chdir(tmp_path)
    assert plan_checkpoints(configured(folders, "mine.jinja")).problems == ()
    for content, words in ((b"\xff", "is not UTF-8 text"), (b"plain", "holds no Jinja text")):
        (tmp_path / "mine.jinja").write_bytes(content)
        with pytest.raises(ConfigError, match=words):
            plan_checkpoints(configured(folders, "mine.jinja"))
    with pytest.raises(ConfigError, match="base: is a folder, not a regular file; name a file"):
        plan_checkpoints(configured(folders, "base"))


def test_the_model_card_has_no_path_of_a_template(tmp_path: Path) -> None:
    folders = write_family(tmp_path)
    path = tmp_path / "mine.jinja"
    path.write_text(NEW)
    merge_checkpoints(configured(folders, str(path)), tmp_path / "out")
    for name in ("README.md", "pymerge_manifest.json"):
        text = (tmp_path / "out" / name).read_text()
        assert "chat_template: mine.jinja" in text and str(tmp_path) not in text
    slashed = "{% if 1 %}/a/b{% endif %} /c/d"
    merge_checkpoints(configured(folders, slashed), tmp_path / "again")
    assert slashed in (tmp_path / "again" / "README.md").read_text()


def test_where_else_a_template_is(tmp_path: Path) -> None:
    """An older transformers reads these; other templates by name stay."""
    folders = write_family(tmp_path)
    give(folders[0], ONE, "several")
    (folders[0] / "chat_template.json").write_text(json.dumps({"chat_template": ONE, "x": 1}))
    merge_checkpoints(configured(folders, NEW), tmp_path / "out")
    assert template_of(tmp_path / "out") == NEW
    made = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    others = [{"name": "default", "template": NEW}, {"name": "tool_use", "template": NEW}]
    assert made == {"eos_token": "</s>", "chat_template": others}
    made = json.loads((tmp_path / "out" / "chat_template.json").read_text())
    assert made == {"chat_template": NEW, "x": 1}
    give(folders[0], ONE, "config")
    merge_checkpoints(configured(folders, NEW), tmp_path / "again")
    made = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    assert made["chat_template"] == NEW


SAID = {
    "alpaca": (
        "brief\n\n### Instruction:\none\n\n### Response:\ntwo\n\n### Instruction:\nthree",
        "\n\n### Response:\n",
    ),
    "chatml": (
        "<|im_start|>system\nbrief<|im_end|>\n<|im_start|>user\none<|im_end|>\n"
        "<|im_start|>assistant\ntwo<|im_end|>\n<|im_start|>user\nthree<|im_end|>\n",
        "<|im_start|>assistant\n",
    ),
    "exaone": (
        "[|system|]brief[|endofturn|]\n[|user|]one\n[|assistant|]two[|endofturn|]\n[|user|]three\n",
        "[|assistant|]",
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nbrief<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\none<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\ntwo<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nthree<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "mistral": ("<s> [INST] brief\n\none [/INST] two</s> [INST] three [/INST]", ""),
}
CONVERSATION = [
    {"role": "system", "content": "brief"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
]


def rendered(name: str, messages: list[dict[str, str]], prompt: bool) -> str:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    made, _ = utils.render_jinja_template(
        [messages],
        chat_template=NAMED[name],
        add_generation_prompt=prompt,
        bos_token="<s>",
        eos_token="</s>",
    )
    return str(made[0])


@pytest.mark.parametrize("name", NAMED)
def test_formats(name: str) -> None:
    pytest.importorskip("jinja2")
    text, prompt = SAID[name]
    assert rendered(name, CONVERSATION, False) == text
    assert rendered(name, CONVERSATION, True) == text + prompt


def test_formats_without_a_system_message() -> None:
    pytest.importorskip("jinja2")
    one = CONVERSATION[1:2]
    empty = "[|system|][|endofturn|]\n[|user|]one\n"
    assert rendered("exaone", one, False) == empty
    assert rendered("mistral", one, True) == "<s> [INST] one [/INST]"
    assert rendered("alpaca", one, True) == "### Instruction:\none\n\n### Response:\n"


@pytest.mark.parametrize("roles", [["assistant"], ["user", "user"], ["user", "system"]])
def test_mistral_takes_turns(roles: list[str]) -> None:
    exceptions = pytest.importorskip("jinja2.exceptions")
    messages = [{"role": role, "content": "x"} for role in roles]
    with pytest.raises(exceptions.TemplateError, match="take turns"):
        rendered("mistral", messages, False)
