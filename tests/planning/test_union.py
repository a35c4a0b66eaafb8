"""Unions of tokenizers and rows of single tokens (docs/spec/rows.md, V9 and V10), against models whose
rows were moved before.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import solve_cases
import torch
import yaml
from folder_cases import CONFIG, assert_same, read_result, write_model
from safetensors.torch import save_file
from token_cases import (
    METHODS,
    ROWS,
    TABLES,
    VOCABULARIES,
    WORDS,
    Ids,
    configured,
    ids_of,
    moved,
    states_of,
    write_tokenizer,
)

from pymerge.checkpoint.tokens import TokenReader
from pymerge.engine.merge import merge_checkpoints, plan_checkpoints
from pymerge.errors import CheckpointError

UNIONS: dict[str, tuple[list[dict[str, int]], list[int]]] = {
    **{k: VOCABULARIES[k] for k in ("permuted", "added to one", "added to both", "padded")},
    "renamed": VOCABULARIES["renamed"],
    "trained": (
        [ids_of(WORDS), ids_of(["v1", *WORDS, "<b>", "v0"]), ids_of([*WORDS, "v2", "<a>", "v1"])],
        [0, 0, 0],
    ),
    "beyond the rows": (
        [ids_of([*WORDS, "<a>", "<b>"]), ids_of([*WORDS, "<b>"]), ids_of([*WORDS, "<c>", "<d>"])],
        [-2, 0, -1],
    ),
}


def rows_of(ids: Ids, more: int) -> int:
    return max(ids.values()) + 1 + more


def union_of(vocabularies: list[dict[str, int]], more: list[int]) -> dict[str, int]:
    """V9, token by token. The base is the first."""
    known = [
        {t: i for t, i in ids.items() if i < rows_of(ids, extra)}
        for ids, extra in zip(vocabularies, more, strict=True)
    ]
    found = dict(known[0])
    for added in (False, True):
        for ids in known:
            for token in sorted(ids, key=ids.__getitem__):
                if token not in found and (token[0] == "<") is added:
                    found[token] = len(found)
    return found


def write_folders(
    root: Path, vocabularies: list[dict[str, int]], more: list[int]
) -> tuple[list[Path], list[Path]]:
    """The models as they are, and as they would be with the union's tokenizer."""
    states = states_of(vocabularies, more, [torch.bfloat16] * len(more))
    folders = [write_model(root / f"m{k}", state) for k, state in enumerate(states)]
    for folder, ids in zip(folders, vocabularies, strict=True):
        write_tokenizer(folder, ids)
    wanted = [dict(state) for state in states]
    union = union_of(vocabularies, more)
    for name in TABLES:
        order = [1, 2, 0]  # the base is the last input
        tables = [states[k][name] for k in order]
        made = moved(tables, [vocabularies[k] for k in order], union, 2)
        for k, table in zip(order, made, strict=True):
            wanted[k][name] = table
    return folders, [write_model(root / f"moved{k}", state) for k, state in enumerate(wanted)]


@pytest.mark.parametrize("method", ["linear", "ties"])
@pytest.mark.parametrize("case", UNIONS)
def test_as_if_moved_before(tmp_path: Path, case: str, method: str) -> None:
    assert method in METHODS
    folders, wanted = write_folders(tmp_path, *UNIONS[case])
    merge_checkpoints(configured(method, folders, tokenizer_source="union"), tmp_path / "out")
    merge_checkpoints(configured(method, wanted), tmp_path / "wanted")
    assert_same(read_result(tmp_path / "out"), read_result(tmp_path / "wanted"))
    union = union_of(*UNIONS[case])
    found = TokenReader().read(tmp_path / "out")
    assert found is not None and dict(found.ids) == union
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == len(union)


def test_nothing_to_add_leaves_the_files_as_they_are(tmp_path: Path) -> None:
    """Also ids beyond the rows of the base, which no model has."""
    vocabularies = [ids_of([*WORDS, "<a>"]), ids_of(WORDS), ids_of(WORDS[:30])]
    folders, _ = write_folders(tmp_path, vocabularies, [-1, 0, 0])
    merge_checkpoints(configured("ties", folders, tokenizer_source="union"), tmp_path / "out")
    given = (folders[0] / "tokenizer.json").read_bytes()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == given


def test_a_union_without_a_base(tmp_path: Path) -> None:
    """The first model's tokenizer, and means where several models have a token."""
    vocabularies = [ids_of([*WORDS, "<b>"]), ids_of([*WORDS, "<a>"]), ids_of([*WORDS, "<a>"])]
    folders, _ = write_folders(tmp_path, vocabularies, [0, 0, 0])
    config = configured("linear", folders, tokenizer_source="union")
    config["models"].reverse()
    del config["base_model"]
    config["out_dtype"] = "float32"
    merge_checkpoints(config, tmp_path / "out")
    found = TokenReader().read(tmp_path / "out")
    assert found is not None and dict(found.ids) == ids_of([*WORDS, "<b>", "<a>"])
    rows = [read_result(f)[TABLES[0]].float() for f in folders]
    mean = ((rows[1][ROWS] + rows[2][ROWS]) / 2).bfloat16().float()
    wanted = (0.3 * mean + 0.3 * rows[1][ROWS] + 0.3 * rows[2][ROWS]) / 0.9
    torch.testing.assert_close(read_result(tmp_path / "out")[TABLES[0]][ROWS + 1], wanted)


def test_a_model_without_tokenizer_has_the_bases(tmp_path: Path) -> None:
    folders, wanted = write_folders(tmp_path, *UNIONS["added to one"])
    (folders[2] / "tokenizer.json").unlink()
    merge_checkpoints(configured("ties", folders, tokenizer_source="union"), tmp_path / "out")
    merge_checkpoints(configured("ties", wanted), tmp_path / "wanted")
    assert_same(read_result(tmp_path / "out"), read_result(tmp_path / "wanted"))


def test_one_tokenizer_whose_last_tokens_one_model_lacks(tmp_path: Path) -> None:
    """The files are the same; the rows of one model are as many as the tokens."""
    every = ids_of([*WORDS, "<a>", "<b>"])
    folders, wanted = write_folders(tmp_path, [every] * 3, [-2, 0, -1])
    merge_checkpoints(configured("ties", folders, tokenizer_source="union"), tmp_path / "out")
    merge_checkpoints(configured("ties", wanted), tmp_path / "wanted")
    assert_same(read_result(tmp_path / "out"), read_result(tmp_path / "wanted"))
    found = TokenReader().read(tmp_path / "out")
    assert found is not None and dict(found.ids) == every


# The files


def tokenizer_json(folder: Path, **changes: Any) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text())
    content |= changes
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return content


def entry(number: int, content: str, **flags: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": number, "content": content, **plain, **flags}


def flags_of(folder: Path) -> dict[str, dict[str, Any]]:
    content = json.loads((folder / "tokenizer.json").read_text())
    return {each["content"]: each for each in content["added_tokens"]}


def test_flags_are_those_of_the_first_that_lists_a_token(tmp_path: Path) -> None:
    folders, _ = write_folders(tmp_path, [ids_of(WORDS)] * 3, [0, 3, 3])
    lists = [
        [entry(7, "w7", special=True)],
        [entry(ROWS, "<a>", lstrip=True, special=True), entry(8, "w8", single_word=True)],
        [entry(ROWS, "<b>", rstrip=True), entry(ROWS + 1, "<a>", normalized=True)],
    ]
    for folder, added in zip(folders, lists, strict=True):
        tokenizer_json(folder, added_tokens=added)
    merge_checkpoints(configured("ties", folders, tokenizer_source="union"), tmp_path / "out")
    content = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert content["added_tokens"] == [
        entry(7, "w7", special=True),
        entry(8, "w8", single_word=True),  # trained in the base, whose id it keeps
        entry(ROWS, "<a>", lstrip=True, special=True),
        entry(ROWS + 1, "<b>", rstrip=True),
    ]
    assert content["model"] == json.loads((folders[0] / "tokenizer.json").read_text())["model"]


def test_trained_tokens_are_added_as_plain_ones(tmp_path: Path) -> None:
    folders, _ = write_folders(tmp_path, *UNIONS["trained"])
    merge_checkpoints(configured("ties", folders, tokenizer_source="union"), tmp_path / "out")
    assert flags_of(tmp_path / "out")["v1"] == entry(ROWS, "v1", normalized=True)


def test_files_beside_that_list_added_tokens(tmp_path: Path) -> None:
    folders, _ = write_folders(tmp_path, *UNIONS["beyond the rows"])
    flags = {"content": "<b>", "special": True}
    decoder = {"added_tokens_decoder": {str(ROWS + 1): flags}, "eos_token": "w2"}
    (folders[0] / "tokenizer_config.json").write_text(json.dumps(decoder))
    (folders[0] / "added_tokens.json").write_text(json.dumps({"<a>": ROWS, "<b>": ROWS + 1}))
    (folders[2] / "tokenizer_config.json").write_text('{"added_tokens_decoder": {}}')
    merge_checkpoints(configured("ties", folders, tokenizer_source="union"), tmp_path / "out")
    out = tmp_path / "out"
    made = json.loads((out / "tokenizer_config.json").read_text())
    assert made["eos_token"] == "w2" and set(made["added_tokens_decoder"]) == {"37", "38"}
    assert made["added_tokens_decoder"]["37"]["content"] == "<b>"
    assert made["added_tokens_decoder"]["37"]["special"] is True
    assert json.loads((out / "added_tokens.json").read_text()) == {"<b>": ROWS, "<c>": ROWS + 1}
    found = TokenReader().read(out)
    assert found is not None and dict(found.ids) == union_of(*UNIONS["beyond the rows"])


@pytest.mark.parametrize("kind", ["list", "text"])
def test_tokens_without_a_row_go_with_their_merges(tmp_path: Path, kind: str) -> None:
    folders, _ = write_folders(tmp_path, *UNIONS["added to one"])
    vocab = {**ids_of(WORDS), "w0w1": ROWS, "w0w1w2": ROWS + 1}
    merges = [["w3", "w4"], ["w0", "w1"], ["w0w1", "w2"], ["w5", "w0w1"]]
    stored = merges if kind == "list" else [" ".join(pair) for pair in merges]
    model = {"type": "BPE", "vocab": vocab, "merges": stored}
    tokenizer_json(folders[0], model=model)
    merge_checkpoints(configured("ties", folders, tokenizer_source="union"), tmp_path / "out")
    made = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]
    assert made["merges"] == stored[:1] and made["vocab"] == ids_of(WORDS)


def test_pieces_without_a_row_go(tmp_path: Path) -> None:
    folders, _ = write_folders(tmp_path, *UNIONS["added to one"])
    pieces = [[word, -1.0] for word in [*WORDS, "more"]]
    tokenizer_json(folders[0], model={"type": "Unigram", "vocab": pieces})
    merge_checkpoints(configured("ties", folders, tokenizer_source="union"), tmp_path / "out")
    made = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert made["model"]["vocab"] == pieces[:-1]
    assert [each["id"] for each in made["added_tokens"]] == [ROWS, ROWS + 1]


def test_transformers_loads_the_union(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folders, _ = write_folders(tmp_path, *UNIONS["added to both"])
    for folder, words in zip(folders, (WORDS, WORDS, WORDS), strict=True):
        model = tokenizers.models.WordLevel(ids_of(words), unk_token="w0")
        made = tokenizers.Tokenizer(model)
        made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        listed = flags_of(folder)
        made.add_special_tokens(sorted(listed, key=lambda t, of=listed: of[t]["id"]))
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0", eos_token="w2")  # fmt: skip
        fast.save_pretrained(folder)
    merge_checkpoints(configured("ties", folders, tokenizer_source="union"), tmp_path / "out")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.get_vocab() == union_of(*UNIONS["added to both"])
    assert loaded.eos_token == "w2"
    text = "w3 <a>w4<c> <d>"
    tokens = ["w3", "<a>", "w4", "<c>", "<d>"]
    assert loaded.convert_ids_to_tokens(loaded(text)["input_ids"]) == tokens


def test_the_configs_keep_the_special_tokens(tmp_path: Path) -> None:
    folders, _ = write_folders(tmp_path, *UNIONS["beyond the rows"])
    ids = {"eos_token_id": 2, "pad_token_id": ROWS, "bos_token_id": None}
    (folders[0] / "config.json").write_text(json.dumps({**CONFIG, **ids}))
    (folders[0] / "generation_config.json").write_text('{"eos_token_id": [2, 38, 3]}')
    (folders[1] / "generation_config.json").write_text('{"eos_token_id": 9}')
    merge_checkpoints(configured("ties", folders, tokenizer_source="union"), tmp_path / "out")
    made = json.loads((tmp_path / "out" / "config.json").read_text())
    # <a>, which had no row, is gone; <b> has another id.
    assert (made["eos_token_id"], made["pad_token_id"], made["bos_token_id"]) == (2, None, None)
    made = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert made == {"eos_token_id": [2, ROWS, 3]}


def test_special_tokens_of_a_tokenizer_that_grows(tmp_path: Path) -> None:
    """A new token may have the id of one that has no row; that one's id is then not the end's."""
    every = ids_of([*WORDS, "<end>", "<pad>"])
    folders, _ = write_folders(tmp_path, [ids_of(WORDS), every, ids_of(WORDS)], [0, -2, 0])
    tokens = {"<new>": {"source": {"kind": "zero"}}, "<pad>": {"source": {"kind": "zero"}}}
    special = {"eos_token": "<end>", "pad_token": "<pad>", "bos_token": "w4"}
    (folders[1] / "tokenizer_config.json").write_text(json.dumps(special))
    ids = {"eos_token_id": 3, "pad_token_id": 3, "bos_token_id": 3}
    (folders[0] / "config.json").write_text(json.dumps({**CONFIG, **ids}))
    found, _ = merged(with_tokens(folders, str(folders[1]), tokens), tmp_path / "out")
    assert (found["<new>"], found["<pad>"]) == (ROWS, ROWS + 1) and "<end>" not in found
    made = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [made[key] for key in ids] == [3, ROWS + 1, 4]


def test_notes(tmp_path: Path) -> None:
    folders, _ = write_folders(tmp_path, *UNIONS["beyond the rows"])
    notes = "\n".join(plan_checkpoints(configured("ties", folders, tokenizer_source="union")).notes)
    assert f"2 tokens ('<b>', '<c>') added to the tokenizer of {folders[0]}" in notes
    assert f"{folders[0]} has 2 tokens ('<a>', '<b>') without a row in its own model" in notes
    given = "1 token ('<c>') that it lacks is given a row"
    assert f"{folders[1]}, to the union of the tokenizers: {given}" in notes


# Rows of single tokens


def with_tokens(folders: list[Path], source: str, tokens: Any, method: str = "linear") -> Any:
    return configured(method, folders, tokenizer={"source": source, "tokens": tokens})


def merged(config: Any, out: Path) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
    merge_checkpoints(config, out)
    found = TokenReader().read(out)
    assert found is not None
    return dict(found.ids), read_result(out)


@pytest.mark.parametrize("source", ["base", "union", "m1"])
def test_new_tokens(tmp_path: Path, source: str) -> None:
    folders, _ = write_folders(tmp_path, *UNIONS["added to both"])
    one, two = str(folders[1]), str(folders[2])
    tokens = {
        "<n0>": {"source": {"kind": "model_token", "model": one, "token": "<b>"}},
        "<n1>": {"source": {"kind": "model_token", "model": two, "token_id": 4}},
        "<n2>": {"source": {"kind": "zero"}},
        "<n3>": None,
        "w1": None,
    }
    chosen = one if source == "m1" else source
    ids, state = merged(with_tokens(folders, chosen, tokens), tmp_path / "out")
    last = {"base": ROWS, "union": ROWS + 4, "m1": ROWS + 3}[source]
    assert [ids[f"<n{i}>"] for i in range(4)] == [last, last + 1, last + 2, last + 3]
    assert len(ids) == last + 4 == len(state[TABLES[0]])
    for name in TABLES:
        rows = [read_result(folder)[name].float() for folder in folders]
        # All models have the same row, so that a mean of them is that row.
        torch.testing.assert_close(state[name][last], rows[1][ROWS + 2], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(state[name][last + 1], rows[2][4], rtol=1e-6, atol=1e-6)
        assert (state[name][last + 2 :] == 0).all()
    made = flags_of(tmp_path / "out")
    assert made["<n0>"] == entry(last, "<n0>", normalized=True) and "w1" not in made


def test_rows_for_models_that_lack_a_token(tmp_path: Path) -> None:
    """m1 alone has <b>, m2 alone has <c>; <a> is in both."""
    folders, _ = write_folders(tmp_path, *UNIONS["added to both"])
    one, two = str(folders[1]), str(folders[2])
    sources = {
        "<b>": {"source": {"kind": "zero"}},
        "<c>": {"source": {"kind": "model_token", "model": one, "token": "w5"}},
        "<a>": {"source": two},
    }
    ids, state = merged(with_tokens(folders, "union", sources), tmp_path / "out")
    forced = {t: {**v, "force": True} for t, v in sources.items()}
    _, every = merged(with_tokens(folders, "union", forced), tmp_path / "forced")
    for name in TABLES:
        base, a, b = (read_result(folder)[name].float() for folder in folders)
        close = {"rtol": 1e-5, "atol": 1e-6}
        # weights 0.3 each, normalised
        torch.testing.assert_close(state[name][ids["<b>"]], a[ROWS + 2] / 3, **close)
        torch.testing.assert_close(state[name][ids["<c>"]], (2 * a[5] + b[ROWS]) / 3, **close)
        mean = (a[ROWS] + 2 * b[ROWS + 1]) / 3
        torch.testing.assert_close(state[name][ids["<a>"]], mean, **close)
        assert (every[name][ids["<b>"]] == 0).all()
        torch.testing.assert_close(every[name][ids["<c>"]], a[5], **close)
        torch.testing.assert_close(every[name][ids["<a>"]], b[ROWS + 1], **close)
        mean = (base + a[:ROWS] + b[:ROWS]) / 3
        torch.testing.assert_close(state[name][:ROWS], mean, **close)


def test_a_row_forced_on_the_model_that_gives_it(tmp_path: Path) -> None:
    """Its own row of the token is replaced by that of the other token."""
    folders, _ = write_folders(tmp_path, [ids_of(WORDS)] * 3, [0, 0, 0])
    source = {"kind": "model_token", "model": str(folders[1]), "token": "w9"}
    config = with_tokens(folders, "base", {"w3": {"source": source, "force": True}})
    _, state = merged(config, tmp_path / "out")
    notes = plan_checkpoints(config).notes
    assert sum("1 token ('w3') with the row that the recipe gives" in note for note in notes) == 3
    for name in TABLES:
        row = read_result(folders[1])[name].float()[9]
        torch.testing.assert_close(state[name][3], row, rtol=1e-6, atol=1e-6)
    given = (folders[0] / "tokenizer.json").read_bytes()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == given


def test_the_model_card_has_tokens_as_they_are_and_no_paths(tmp_path: Path) -> None:
    folders, _ = write_folders(tmp_path, [ids_of([*WORDS, "</a/b>", "/w"])] * 3, [0, 0, 0])
    one = str(folders[1])
    tokens = {
        "/new": {"source": {"kind": "model_token", "model": one, "token": "/w"}},
        "token": {"source": {"kind": "model_token", "model": one, "token": "</a/b>"}},
        "w3": {"source": one, "force": True},
    }
    merge_checkpoints(with_tokens(folders, "base", tokens), tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "token: /w\n" in text and "token: </a/b>\n" in text and str(tmp_path) not in text
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert recipe["tokenizer"]["tokens"]["w3"] == {"source": "m1", "force": True}


def test_a_token_that_all_models_have_keeps_its_rows(tmp_path: Path) -> None:
    folders, _ = write_folders(tmp_path, *UNIONS["permuted"])
    tokens = {"w3": {"source": str(folders[1])}, "w4": {"source": {"kind": "zero"}}}
    merge_checkpoints(with_tokens(folders, "base", tokens), tmp_path / "out")
    merge_checkpoints(configured("linear", folders, tokenizer_source="base"), tmp_path / "plain")
    assert_same(read_result(tmp_path / "out"), read_result(tmp_path / "plain"))


# What is refused


def problems(config: Any) -> str:
    return "\n".join(plan_checkpoints(config).problems)


@pytest.mark.parametrize("case", ["holes", "two names"])
def test_a_tokenizer_that_cannot_grow(tmp_path: Path, case: str) -> None:
    vocabularies, more = VOCABULARIES[case]
    if case == "two names":
        vocabularies = [vocabularies[1], ids_of([*WORDS, "<c>"]), vocabularies[0]]
    else:
        vocabularies = [vocabularies[0], {**vocabularies[1], "<c>": ROWS}, vocabularies[2]]
    folders = write_models(tmp_path, vocabularies, more)
    text = problems(configured("ties", folders, tokenizer_source="union"))
    assert f"tokens are added to the tokenizer of {folders[0]}, whose" in text
    assert "each once" in text
    tokens = {"new": {"source": {"kind": "zero"}}}
    assert "each once" in problems(with_tokens(folders, "base", tokens))
    assert problems(configured("ties", folders, tokenizer_source="base")) == ""


def write_models(root: Path, vocabularies: list[dict[str, int]], more: list[int]) -> list[Path]:
    states = states_of(vocabularies, more, [torch.float32] * len(more))
    folders = [write_model(root / f"m{k}", state) for k, state in enumerate(states)]
    for folder, ids in zip(folders, vocabularies, strict=True):
        write_tokenizer(folder, ids)
    return folders


def test_a_tokenizer_of_other_files_cannot_grow(tmp_path: Path) -> None:
    folders, _ = write_folders(tmp_path, *UNIONS["added to one"])
    (folders[0] / "tokenizer.json").unlink()
    (folders[0] / "vocab.txt").write_text("\n".join(WORDS))
    config = configured("ties", folders, tokenizer_source="union")
    assert "which takes a tokenizer.json; save it as one" in problems(config)
    write_tokenizer(folders[1], ids_of(WORDS))
    assert problems(config) == ""  # nothing to add
    (folders[0] / "vocab.txt").unlink()
    assert f"the union of tokenizers starts from {folders[0]}, which has no" in problems(config)


def test_sentencepiece_files_alone(tmp_path: Path) -> None:
    folders = write_models(tmp_path, [ids_of(WORDS)] * 3, [0, 0, 0])
    for folder in folders:
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer.model").write_bytes(b"pieces")
    config = configured("ties", folders, tokenizer_source="union")
    assert problems(config) == ""
    (folders[1] / "added_tokens.json").write_text('{"<a>": 36}')
    assert "are not in files that can be read" in problems(config)
    assert problems(configured("ties", folders, tokenizer_source="base")) == ""
    for folder in folders:
        (folder / "added_tokens.json").write_text('{"<a>": 36}')
    assert problems(config) == ""
    assert "are not in files" in problems(with_tokens(folders, "base", {"new": None}))


def test_rows_that_there_are_not(tmp_path: Path) -> None:
    folders, _ = write_folders(tmp_path, *UNIONS["added to both"])
    one = str(folders[1])

    def told(source: Any) -> str:
        return problems(with_tokens(folders, "union", {"<n>": {"source": source}}))

    def token(**of: Any) -> dict[str, Any]:
        return {"kind": "model_token", "model": one, **of}

    assert f"tokens['<n>']: its source {one} has no row of it in {TABLES[0]}" in told(one)
    assert f"{one} has no row of '<c>' in {TABLES[1]}, of 40 rows" in told(token(token="<c>"))
    assert f"{one} has no row of 40 in {TABLES[0]}, of 40 rows" in told(token(token_id=40))
    assert told(token(token_id=39)) == ""
    others, _ = write_folders(tmp_path / "permuted", *VOCABULARIES["permuted"])
    said = problems(with_tokens(others, "union", {"<n>": {"source": str(others[1])}}))
    assert "has no row of it" in said and "tokenizer_source" not in said  # which is given


def test_a_model_that_is_not_merged_in_the_tensor(tmp_path: Path) -> None:
    folders, _ = write_folders(tmp_path, *UNIONS["added to both"])
    one, two = str(folders[1]), str(folders[2])
    slices = [{"sources": [{"model": m, "layer_range": [0, 2]}]} for m in (one, two)]
    tokens: dict[str, Any] = {"<c>": {"source": two}}
    config = {"merge_method": "passthrough", "slices": slices}
    config["tokenizer"] = {"source": "union", "tokens": tokens}
    text = problems(config)
    assert f"tokens['<c>']: its source {two} is not merged in {TABLES[0]}" in text
    assert TABLES[1] not in text
    tokens["<c>"] = {"source": {"kind": "zero"}}
    assert problems(config) == ""


def test_a_token_in_every_text_without_a_row(tmp_path: Path) -> None:
    folders, _ = write_folders(tmp_path, *UNIONS["beyond the rows"])
    special = {"<a>": {"id": "<a>", "ids": [ROWS], "tokens": ["<a>"]}}
    template = [{"SpecialToken": {"id": "<a>", "type_id": 0}}, {"Sequence": {"id": "A"}}]
    processor = {"type": "TemplateProcessing", "single": template, "special_tokens": special}
    tokenizer_json(folders[0], post_processor=processor)
    text = problems(configured("ties", folders, tokenizer_source="union"))
    assert "the tokenizer puts <a> into every text" in text


@pytest.mark.parametrize(
    "model",
    [
        {"type": "BPE", "vocab": {**ids_of(WORDS), "x": ROWS}, "merges": [1, [2]]},
        {"type": "BPE", "vocab": {**ids_of(WORDS), "x": ROWS}, "merges": 7},
    ],
)
def test_damaged_merges(tmp_path: Path, model: dict[str, Any]) -> None:
    folders, _ = write_folders(tmp_path, *UNIONS["added to one"])
    tokenizer_json(folders[0], model=model)
    config = configured("ties", folders, tokenizer_source="union")
    assert "no tokens can be added to the tokenizer of the result" in problems(config)
    with pytest.raises(CheckpointError, match="no tokens can be added"):
        merge_checkpoints(config, tmp_path / "out")


def test_statistics_move_no_rows(tmp_path: Path) -> None:
    """V8, nor do they take rows of single tokens."""
    folders = write_models(tmp_path, *UNIONS["added to one"])
    files = [
        solve_cases.write_statistics(tmp_path / f"{k}.stats", read_result(folder), k)
        for k, folder in enumerate(folders)
    ]
    config = solve_cases.recipe("regmean", folders, files)
    text = problems({**config, "tokenizer_source": "union"})
    assert text.count("merge_method regmean does not move them") == len(TABLES)
    for folder in folders:
        (folder / "tokenizer.json").unlink()
        write_tokenizer(folder, ids_of(WORDS))
    same = [folders[0], folders[2]]
    config = solve_cases.recipe("regmean", same, [files[0], files[2]])
    assert problems({**config, "tokenizer_source": "union"}) == ""
    tokens = {"w3": {"source": {"kind": "zero"}, "force": True}}
    text = problems({**config, "tokenizer": {"tokens": tokens}})
    assert text.count("merge_method regmean does not move them") == len(TABLES)


def test_models_without_a_table_of_a_known_name(tmp_path: Path) -> None:
    """There is no row for a new token, and no room is made for ids of any size."""
    folders = write_models(tmp_path, *UNIONS["added to one"])
    for folder in folders:
        save_file({"blob": torch.zeros(4, 4)}, folder / "model.safetensors")
    config = configured("ties", folders, tokenizer_source="union")
    assert "2 tokens ('<a>', '<b>') would be added to the tokenizer, but by its" in problems(config)
    config = with_tokens(folders, "base", {"new": {"source": {"kind": "zero"}}}, "ties")
    assert "1 token ('new') would be added" in problems(config)
    write_tokenizer(folders[0], {**ids_of([*WORDS, "<a>", "<b>"]), "far": (1 << 31) - 1})
    assert problems(configured("ties", folders, tokenizer_source="union")) == ""


def test_damaged_ids(tmp_path: Path) -> None:
    """No row is made for ids that no model has."""
    vocabularies, more = UNIONS["added to one"]
    folders = write_models(tmp_path, vocabularies, more)
    for folder, ids in zip(folders, vocabularies, strict=True):
        write_tokenizer(folder, {**ids, "far": (1 << 31) - 1})
    plan = plan_checkpoints(configured("ties", folders, tokenizer_source="union"))
    assert plan.problems == () and plan.vocabulary is not None
    assert plan.vocabulary.rows == ROWS + 2


def test_tables_of_other_names(tmp_path: Path) -> None:
    folders = write_models(tmp_path, *UNIONS["added to one"])
    for folder in folders:
        state = read_result(folder)
        state["table.weight"] = torch.zeros(len(state[TABLES[0]]), 4)
        (folder / "model.safetensors").unlink()
        save_file(state, folder / "model.safetensors")
    text = problems(configured("ties", folders, tokenizer_source="union"))
    assert "table.weight" in text
