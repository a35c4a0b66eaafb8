"""Unions of tokenizers, rows of single tokens and chat templates against the installed mergekit: the
same recipe, the same vocabulary, rows and encodings (pytest -m parity).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit_cases import in_order
from safetensors.torch import load_file
from trained_tokenizers import tokenizer

import pymerge

pytestmark = pytest.mark.parity

pytest.importorskip("mergekit", reason="mergekit is not installed")
pytest.importorskip("tokenizers", reason="tokenizers is not installed")

TABLES = ("model.embed_tokens.weight", "lm_head.weight")
TEXTS = [
    "<|im_start|>user\nthe words of a model<|im_end|>\n",
    "fine-tuned <tool>models</tool> keep <a><b> <c> naïve",
    "one<tool>two <tool> three  spaces <|im_end|><d>",
    "",
]


CLASSES = {"qwen": "Qwen2Tokenizer", "llama2": "LlamaTokenizer", "wordpiece": "BertTokenizer"}


def write_model(
    folder: Path, made: Any, seed: int, more: int = 0, tied: bool = False, kind: str = ""
) -> Path:
    """A small model with a row for each token, and `more` beyond."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(made.get_vocab()) + more,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    if kind in CLASSES:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": CLASSES[kind]}))  # fmt: skip
    return folder


def added_token(content: str, **flags: bool) -> Any:
    from tokenizers import AddedToken

    return AddedToken(content, **{"normalized": False, **flags})


# What base, a and b add.
ADDED: dict[str, list[list[Any]]] = {
    "to none": [[], [], []],
    "to one": [[], ["<|im_start|>", "<|im_end|>"], []],
    "to two": [[], ["<a>", "<b>"], ["<c>", "<a>"]],
    "to all": [["<d>", "<a>"], ["<a>", "<b>"], ["<c>", "<a>"]],
    "flags": [
        ["<a>"],
        [("<tool>", {"lstrip": True, "rstrip": True}), ("<|im_end|>", {"special": True})],
        [("<a>", {"lstrip": True}), ("<tool>", {"special": True}), ("w", {"single_word": True})],
    ],
}


def family(root: Path, kind: str, added: str, more: tuple[int, ...] = (0, 0, 0), tied: bool = False) -> None:  # fmt: skip
    for seed, (name, tokens) in enumerate(zip(("base", "a", "b"), ADDED[added], strict=True)):
        entries = [t if isinstance(t, str) else added_token(t[0], **t[1]) for t in tokens]
        write_model(root / name, tokenizer(kind, entries), seed, more[seed], tied, kind)


def recipe(method: str, **more: Any) -> dict[str, Any]:
    models = [{"model": name, "parameters": {"weight": 0.4}} for name in ("a", "b")]
    config: dict[str, Any] = {"merge_method": method, "base_model": "base", "models": models}
    if method == "linear":
        models.append({"model": "base", "parameters": {"weight": 0.3}})
    if method == "ties":
        config["parameters"] = {"density": 0.6}
    if method == "slerp":
        config |= {"models": [{"model": "base"}, {"model": "a"}], "parameters": {"t": 0.3}}
    if method == "passthrough":
        slices = [("a", [0, 1]), ("b", [1, 2]), ("a", [1, 2])]
        config = {
            "merge_method": method,
            "slices": [{"sources": [{"model": m, "layer_range": r}]} for m, r in slices],
        }
    return config | more


def located(value: Any, folder: Path) -> Any:
    """By full path: mergekit keeps its loaders by name for the life of the process."""
    if isinstance(value, dict):
        return {key: located(each, folder) for key, each in value.items()}
    if isinstance(value, list):
        return [located(each, folder) for each in value]
    return str(folder / value) if value in ("a", "b", "base_", "c") else value


def run_both(root: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    config = located(config, root)
    if "base_model" in config:
        config["base_model"] = str(root / "base")
    for each in config.get("models", ()):
        if each["model"] == "base":
            each["model"] = str(root / "base")
    monkeypatch.setattr(MergeConfiguration, "referenced_models", in_order)
    options = MergeOptions(quiet=True, write_model_card=False)
    run_merge(MergeConfiguration.model_validate(config), str(root / "theirs"), options)
    (root / "recipe.yml").write_text(yaml.safe_dump(config))
    pymerge.merge_checkpoints(root / "recipe.yml", root / "ours")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}


def compare(root: Path, *, ids: bool = True) -> None:
    """ids: whether the ids are equal too; otherwise every token's rows."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours, theirs = (AutoTokenizer.from_pretrained(root / which) for which in ("ours", "theirs"))
    mine, other = ours.get_vocab(), theirs.get_vocab()
    assert mine == other if ids else mine.keys() == other.keys()
    order = sorted(mine, key=mine.__getitem__)
    made, wanted = tensors_of(root / "ours"), tensors_of(root / "theirs")
    assert made.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if name in TABLES:
            places = [other[token] for token in order]
            tensor = torch.cat([tensor[places], tensor[len(places) :]])
        torch.testing.assert_close(made[name], tensor, rtol=0, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")  # fmt: skip
    sizes = [json.loads((root / w / "config.json").read_text())["vocab_size"] for w in ("ours", "theirs")]  # fmt: skip
    assert sizes[0] == sizes[1] == len(made[TABLES[0]])
    assert ours.special_tokens_map == theirs.special_tokens_map
    flags = [
        {t.content: str(t) for t in each.added_tokens_decoder.values()} for each in (ours, theirs)
    ]
    assert flags[0] == flags[1]
    for text in TEXTS:
        encoded = [each.convert_ids_to_tokens(each(text)["input_ids"]) for each in (ours, theirs)]
        assert encoded[0] == encoded[1], text
        if ids:
            assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    model, report = AutoModelForCausalLM.from_pretrained(root / "ours", output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(model.get_input_embeddings().weight, made[TABLES[0]])


KINDS = ("qwen", "llama3", "llama2", "wordpiece", "unigram")


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "added"),
    [
        pytest.param(kind, added, marks=() if kind == "qwen" or added == "flags" else SLOW)
        for kind in KINDS
        for added in ADDED
    ],
)
def test_unions(kind: str, added: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family(tmp_path, kind, added)
    run_both(tmp_path, recipe("ties", tokenizer_source="union"), monkeypatch)
    compare(tmp_path)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "passthrough", "slerp"])
def test_unions_by_other_methods(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family(tmp_path, "qwen", "to two")
    run_both(tmp_path, recipe(method, tokenizer_source="union"), monkeypatch)
    compare(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("more", [(0, 0, 0), (7, 0, 3)])
def test_unions_of_padded_models(
    more: tuple[int, ...], tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows beyond the tokens are cut off, and the result is padded anew."""
    family(tmp_path, "llama3", "to two", more, tied)
    tokenizer = {"source": "union", "pad_to_multiple_of": 64}
    run_both(tmp_path, recipe("linear", tokenizer=tokenizer), monkeypatch)
    compare(tmp_path)


@pytest.mark.parametrize("kind", ["qwen", "llama2"])
def test_files_as_older_releases_wrote_them(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Added tokens in tokenizer_config.json too, and special tokens in a file of their own."""
    family(tmp_path, kind, "flags")
    for name in ("base", "a", "b"):
        listed = json.loads((tmp_path / name / "tokenizer.json").read_text())["added_tokens"]
        decoder = {str(each.pop("id")): each for each in listed}
        path = tmp_path / name / "tokenizer_config.json"
        config = {**json.loads(path.read_text()), "added_tokens_decoder": decoder}
        path.write_text(json.dumps(config))
        special = {key: config[key] for key in ("eos_token", "bos_token") if config.get(key)}
        (tmp_path / name / "special_tokens_map.json").write_text(json.dumps(special))
    run_both(tmp_path, recipe("ties", tokenizer_source="union"), monkeypatch)
    compare(tmp_path)


def test_the_union_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family(tmp_path, "qwen", "to one")
    run_both(tmp_path, recipe("ties", tokenizer={"pad_to_multiple_of": 8}), monkeypatch)
    compare(tmp_path)


@pytest.mark.parametrize("kind", ["qwen", "llama2", "wordpiece", "unigram"])
def test_unions_of_trained_tokens(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained tokens that the base lacks become added ones; mergekit orders them anew in every
    process.
    """
    names = {"qwen": ["Ġnew", "zz"], "wordpiece": ["##zz", "new"]}.get(kind, ["▁new", "zz"])
    family(tmp_path, kind, "to two")
    for name, here in (("a", names), ("b", names[1:])):
        content = json.loads((tmp_path / name / "tokenizer.json").read_text())
        vocab = content["model"]["vocab"]
        last = len(vocab)
        if isinstance(vocab, list):
            vocab += [[word, -9.0] for word in here]
        else:
            vocab |= {word: last + i for i, word in enumerate(here)}
        for entry in content["added_tokens"]:
            if entry["id"] >= last:
                entry["id"] += len(here)
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(content))
        rows = last + len(here) + sum(e["id"] >= last for e in content["added_tokens"])
        state = load_file(tmp_path / name / "model.safetensors")
        for table in TABLES:
            state[table] = torch.randn(rows, state[table].shape[1])
        from safetensors.torch import save_file

        save_file(state, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
    run_both(tmp_path, recipe("ties", tokenizer_source="union"), monkeypatch)
    compare(tmp_path, ids=False)


def test_a_trained_token_that_another_model_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps its id and is looked for in the whole text."""
    for seed, (name, added) in enumerate((("base", []), ("a", ["w"]), ("b", ["<|im_end|>"]))):
        made = tokenizer("qwen", [])
        if "w" in added:
            assert "w" in made.get_vocab()
        made.add_tokens([added_token(each, special=True) for each in added])
        write_model(tmp_path / name, made, seed)
    run_both(tmp_path, recipe("ties", tokenizer_source="union"), monkeypatch)
    compare(tmp_path)


def test_ids_beyond_the_rows_of_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The union has them at new ids where another model has their rows, and not at all
    otherwise.
    """
    family(tmp_path, "qwen", "to two")
    made = tokenizer("qwen", ["<c>", "<gone>"])
    made.save_pretrained(tmp_path / "base")
    run_both(tmp_path, recipe("ties", tokenizer_source="union"), monkeypatch)
    compare(tmp_path)
    assert "<gone>" not in (tmp_path / "ours" / "tokenizer.json").read_text()


# Rows of single tokens

TOKENS: dict[str, dict[str, Any]] = {
    "from a model": {"<a>": {"source": "b"}},
    "from a model, forced": {"<a>": {"source": "b", "force": True}},
    "from the token of another name": {
        "<e>": {"source": {"kind": "model_token", "model": "a", "token": "<b>"}},
        "<a>": {"source": {"kind": "model_token", "model": "b", "token": "<c>"}, "force": True},
    },
    "from an id": {
        "<e>": {"source": {"kind": "model_token", "model": "b", "token_id": 3}},
        "<b>": {"source": {"kind": "model_token", "model": "a", "token_id": 0}, "force": True},
    },
    "zero": {"<e>": {"source": {"kind": "zero"}}, "<b>": {"source": {"kind": "zero"}}},
    "zero, forced": {"<a>": {"source": {"kind": "zero"}, "force": True}},
    "a trained one": {"w": {"source": "a", "force": True}, "k": {"source": "b"}},
    "of nobody but in no need of it": {"k": {}, "w": {}},
}


@pytest.mark.parametrize("method", ["linear", pytest.param("ties", marks=SLOW)])
@pytest.mark.parametrize("case", TOKENS)
def test_rows_of_single_tokens(
    case: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family(tmp_path, "qwen", "to two")
    tokenizer = {"source": "union", "tokens": TOKENS[case]}
    run_both(tmp_path, recipe(method, tokenizer=tokenizer), monkeypatch)
    compare(tmp_path)


def test_tokens_that_are_added_to_a_models_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a path: with the base as the source mergekit counts them among the base's own, and
    fails.
    """
    family(tmp_path, "llama2", "to one")
    tokens = {
        "<|im_start|>": {"source": "a"},
        "<new>": {"source": {"kind": "model_token", "model": "a", "token": "<|im_end|>"}},
        "<zero>": {"source": {"kind": "zero"}},
    }
    tokenizer = {"source": "a", "tokens": tokens, "pad_to_multiple_of": 32}
    run_both(tmp_path, recipe("ties", tokenizer=tokenizer), monkeypatch)
    compare(tmp_path)


# Chat templates

CONVERSATIONS = [
    [{"role": "user", "content": "one"}],
    [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}],
    [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ],
]


def rendered(text: str, prompt: bool) -> list[str]:
    from transformers.utils.chat_template_utils import render_jinja_template

    made, _ = render_jinja_template(
        CONVERSATIONS, chat_template=text, add_generation_prompt=prompt, bos_token="<s>", eos_token="</s>"
    )  # fmt: skip
    return list(made)


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("name", ["chatml", "mistral"])
def test_named_templates_render_alike(name: str, prompt: bool) -> None:
    import importlib.resources

    from mergekit._data import chat_templates

    from pymerge.recipe.chat_templates import NAMED

    theirs = importlib.resources.files(chat_templates).joinpath(f"{name}.jinja").read_text()
    assert rendered(NAMED[name], prompt) == rendered(theirs, prompt)


def test_every_named_template_is_there() -> None:
    import importlib.resources

    from mergekit._data import chat_templates

    from pymerge.recipe.chat_templates import NAMED

    files = importlib.resources.files(chat_templates).iterdir()
    assert {f.name.removesuffix(".jinja") for f in files if f.name.endswith(".jinja")} == set(NAMED)


TEMPLATES = {
    "one": "{% for m in messages %}one{{ m.content }}{% endfor %}",
    "two": "{% for m in messages %}two{{ m.content }}{% endfor %}\n",
}


@pytest.mark.parametrize("source", [None, "base", "union"])
@pytest.mark.parametrize(
    ("having", "wanted"),
    [(("one", "two", "two"), "two"), ((None, "one", "two"), "one"), (("one", None, None), "one")],
)
def test_the_commonest_template(
    having: tuple[str | None, ...],
    wanted: str,
    source: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import AutoTokenizer

    for seed, (name, which) in enumerate(zip(("base", "a", "b"), having, strict=True)):
        made = tokenizer("qwen", [])
        made.chat_template = None if which is None else TEMPLATES[which]
        write_model(tmp_path / name, made, seed)
    chosen = {} if source is None else {"tokenizer_source": source}
    run_both(tmp_path, recipe("linear", chat_template="auto", **chosen), monkeypatch)
    made, other = (AutoTokenizer.from_pretrained(tmp_path / w) for w in ("ours", "theirs"))
    assert made.chat_template == other.chat_template == TEMPLATES[wanted].strip()
