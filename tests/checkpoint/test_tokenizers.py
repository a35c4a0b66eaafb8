"""Rows of embeddings are merged only where they are rows of the same tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from folder_cases import recipe, write_family, write_model

from pymerge.checkpoint.tokens import TokenReader
from pymerge.engine.merge import merge_checkpoints, plan_checkpoints
from pymerge.errors import CheckpointError, MismatchError

ROWS = 37
WORDS = [f"w{i}" for i in range(30)]


def write_tokenizer(
    folder: Path, words: list[str], added: Mapping[str, int] | None = None, kind: str = "BPE"
) -> None:
    vocab: Any = {word: i for i, word in enumerate(words)}
    if kind == "Unigram":
        vocab = [[word, -float(i)] for i, word in enumerate(words)]
    content = {
        "added_tokens": [
            {"id": i, "content": t, "special": True} for t, i in (added or {}).items()
        ],
        "model": {"type": kind, "vocab": vocab, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


def planned(folders: list[Path], **more: Any) -> tuple[str, str]:
    """(notes, problems)"""
    plan = plan_checkpoints({**recipe("ties", folders, density=0.5), **more})
    return "\n".join(plan.notes), "\n".join(plan.problems)


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return write_family(tmp_path)


@pytest.mark.parametrize("kind", ["BPE", "Unigram"])
def test_a_shuffled_vocabulary_is_an_error(folders: list[Path], kind: str) -> None:
    write_tokenizer(folders[0], WORDS, kind=kind)
    write_tokenizer(folders[1], WORDS[:1] + WORDS[:0:-1], kind=kind)
    write_tokenizer(folders[2], WORDS, kind=kind)
    config = recipe("ties", folders, density=0.5)
    with pytest.raises(MismatchError) as caught:
        merge_checkpoints(config, folders[0].with_name("out"))
    (text,) = caught.value.problems
    assert "give tokenizer_source" in text
    assert f"28 ids of {folders[0]} and {folders[1]} mean different tokens" in text
    assert "id 1 is 'w1' and 'w29'" in text
    assert not folders[0].with_name("out").exists()


def test_equal_tokenizers_and_none_at_all(folders: list[Path]) -> None:
    assert planned(folders) == ("", "")
    for folder in folders:
        write_tokenizer(folder, WORDS, {"<s>": 30})
    assert planned(folders) == ("", "")
    (folders[1] / "tokenizer.json").unlink()
    assert planned(folders) == ("", "")


def test_models_are_compared_where_the_base_has_no_tokenizer(folders: list[Path]) -> None:
    write_tokenizer(folders[1], WORDS)
    write_tokenizer(folders[2], WORDS[::-1])
    _, problems = planned(folders)
    assert f"30 ids of {folders[1]} and {folders[2]} mean different tokens" in problems


def test_a_new_name_for_an_added_token_is_a_note(folders: list[Path]) -> None:
    write_tokenizer(folders[0], WORDS, {"<s>": 30, "<|reserved_0|>": 31, "<|reserved_1|>": 32})
    write_tokenizer(folders[1], WORDS, {"<s>": 30, "<|im_start|>": 31, "<|im_end|>": 32})
    write_tokenizer(folders[2], WORDS, {"<s>": 30, "<|reserved_0|>": 31, "<|reserved_1|>": 32})
    notes, problems = planned(folders)
    assert problems == ""
    assert "2 added or reserved tokens differ" in notes
    assert "id 31 is '<|reserved_0|>' and '<|im_start|>'" in notes


def test_a_new_name_for_an_unused_token_is_a_note(folders: list[Path]) -> None:
    """As BERT's [unused0], which are no added tokens."""
    for folder in folders:
        write_tokenizer(folder, ["[PAD]", "[unused0]", "[unused1]", *WORDS])
    write_tokenizer(folders[1], ["[PAD]", "gene", "[unused1]", *WORDS])
    notes, problems = planned(folders)
    assert problems == ""
    assert "id 1 is '[unused0]' and 'gene'" in notes


def test_an_ordinary_token_that_gave_way_is_an_error(folders: list[Path]) -> None:
    for folder in folders:
        write_tokenizer(folder, WORDS)
    write_tokenizer(folders[1], [*WORDS[:5], "other", *WORDS[6:]])
    assert "1 id of" in planned(folders)[1]


def test_tokens_in_the_padding_are_a_note(folders: list[Path]) -> None:
    for folder in folders:
        write_tokenizer(folder, WORDS)
    write_tokenizer(folders[2], WORDS, {"<|im_start|>": 30, "<pad>": ROWS})
    notes, problems = planned(folders)
    assert problems == ""
    assert f"{folders[2]} has 1 token more than {folders[0]}" in notes
    assert "30 is '<|im_start|>'" in notes


def test_an_added_token_in_place_of_one_that_is_gone_is_a_note(folders: list[Path]) -> None:
    """As Falcon's >>UNUSED_3<< that became a chat marker; a token that went elsewhere is an
    error.
    """
    for folder in folders:
        write_tokenizer(folder, [*WORDS[:5], ">>UNUSED_3<<", *WORDS[6:]])
    write_tokenizer(folders[1], [*WORDS[:5], "<|im_end|>", *WORDS[6:]], {"<|im_end|>": 5})
    notes, problems = planned(folders)
    assert problems == ""
    assert "id 5 is '>>UNUSED_3<<' and '<|im_end|>'" in notes
    write_tokenizer(
        folders[1], [*WORDS[:5], "<|im_end|>", *WORDS[6:], ">>UNUSED_3<<"], {"<|im_end|>": 5}
    )
    assert "1 id of" in planned(folders)[1]


def test_an_added_token_beside_the_name_of_a_free_slot_is_a_note(folders: list[Path]) -> None:
    """As where a fine-tune gives [PAD151650] or madeupword0000 a name and leaves the vocabulary as
    it is.
    """
    for folder in folders:
        write_tokenizer(folder, [*WORDS[:5], "madeupword0000", *WORDS[6:]])
    write_tokenizer(
        folders[1], [*WORDS[:5], "madeupword0000", *WORDS[6:]], {"<|im_end|>": 5, "<|x|>": 30}
    )
    notes, problems = planned(folders)
    assert problems == ""
    assert "1 added or reserved token differs" in notes and "its row is merged" in notes
    assert "id 5 is 'madeupword0000' and '<|im_end|>'" in notes


def test_ids_beyond_the_rows_are_an_error(folders: list[Path], tmp_path: Path) -> None:
    for folder in folders:
        write_tokenizer(folder, WORDS)
    larger = tmp_path / "larger"
    state = {"model.embed_tokens.weight": torch.zeros(ROWS + 2, 8)}
    write_model(larger, state)
    write_tokenizer(larger, WORDS, {"<x>": ROWS, "<y>": ROWS + 1})
    slices = [{"sources": [{"model": str(folders[k]), "layer_range": [0, 1]}]} for k in (1, 2, 1)]
    config = {"merge_method": "passthrough", "slices": slices, "base_model": str(larger)}
    (problem,) = plan_checkpoints(config).problems
    assert f"the tokenizer of {larger} has 2 ids" in problem
    assert f"with {ROWS} rows" in problem and f"{ROWS} is '<x>'" in problem


def test_ids_that_their_own_model_has_no_rows_for_are_a_note(folders: list[Path]) -> None:
    """As the image token of Gemma 3's text models, at the id behind the last row."""
    for folder in folders:
        write_tokenizer(folder, WORDS, {"<image_soft_token>": ROWS})
    notes, problems = planned(folders)
    assert problems == ""
    assert f"{ROWS} is '<image_soft_token>'" in notes and "of its own model" in notes


def test_models_that_give_no_rows_are_not_compared(folders: list[Path]) -> None:
    write_tokenizer(folders[1], WORDS)
    write_tokenizer(folders[2], WORDS[::-1])
    slices = [{"sources": [{"model": str(folders[k]), "layer_range": [0, 1]}]} for k in (1, 2, 1)]
    config: dict[str, Any] = {"merge_method": "passthrough", "slices": slices}
    assert plan_checkpoints(config).problems == ()
    slices.append({"sources": [{"model": str(folders[2]), "layer_range": [1, 2]}]})
    assert "30 ids of" in plan_checkpoints(config).problems[0]


def test_slow_tokenizers_are_compared_with_fast_ones(folders: list[Path]) -> None:
    write_tokenizer(folders[0], WORDS, {"<s>": 30})
    vocab = {word: i for i, word in enumerate(WORDS)}
    (folders[1] / "vocab.json").write_text(json.dumps(vocab))
    (folders[1] / "added_tokens.json").write_text(json.dumps({"<s>": 30}))
    (folders[2] / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    decoder = {"added_tokens_decoder": {"30": {"content": "<t>"}}}
    (folders[2] / "tokenizer_config.json").write_text(json.dumps(decoder))
    notes, problems = planned(folders)
    assert problems == ""
    assert notes.count("added or reserved") == 1 and "30 is '<s>' and '<t>'" in notes


def test_a_vocabulary_per_language_is_not_compared(folders: list[Path]) -> None:
    for k, folder in enumerate(folders):
        content = {"eng": {"a": k, "b": 1 - k}, "fra": {"a": 0}}
        (folder / "vocab.json").write_text(json.dumps(content))
    assert planned(folders) == ("", "")


def test_sentencepiece_files_are_compared_as_a_whole(folders: list[Path]) -> None:
    for folder in folders:
        (folder / "tokenizer.model").write_bytes(b"pieces")
    assert planned(folders) == ("", "")
    (folders[1] / "tokenizer.model").write_bytes(b"others")
    assert f"SentencePiece files of {folders[0]} and {folders[1]} differ" in planned(folders)[1]
    for folder in folders:
        write_tokenizer(folder, WORDS)
    assert planned(folders) == ("", "")
    (folders[1] / "tokenizer.model").unlink()
    (folders[0] / "tokenizer.json").unlink()
    assert "not compared" in planned(folders)[0]


@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1",
        b"[1]",
        b'{"model": 3}',
        b'{"model": {"vocab": {"a": "b"}}}',
        b'{"model": {"vocab": {"a": -1}}}',
        b'{"model": {"vocab": {"a": 1}}, "added_tokens": [{"id": 5}]}',
        b"\xff\xfe",
        b"",
        b"[" * 100_000,
    ],
)
def test_damaged_tokenizers_are_named(folders: list[Path], content: bytes) -> None:
    write_tokenizer(folders[0], WORDS)
    (folders[1] / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer.json.*download it again"):
        plan_checkpoints(recipe("ties", folders, density=0.5))


def test_a_pointer_in_place_of_the_only_tokenizer_is_named(folders: list[Path]) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n"
    (folders[0] / "tokenizer.json").write_bytes(pointer)
    with pytest.raises(CheckpointError, match=r"tokenizer.json.*download it again"):
        plan_checkpoints(recipe("ties", folders, density=0.5))


def test_equal_files_are_parsed_once(folders: list[Path]) -> None:
    reader = TokenReader()
    for folder in folders:
        write_tokenizer(folder, WORDS)
    assert len({id(reader.read(folder)) for folder in folders}) == 1
    write_tokenizer(folders[1], WORDS[::-1])
    assert reader.read(folders[1]) is not reader.read(folders[0])


def test_the_ids_are_those_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="w0")
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model), unk_token="w0"
    )
    made.add_tokens(["plain"])
    made.add_special_tokens({"pad_token": "<pad>"})
    made.save_pretrained(tmp_path)
    tokens = TokenReader().read(tmp_path)
    assert tokens is not None
    assert tokens.fits(32) and not tokens.fits(31)
    assert dict(tokens.ids) == made.get_vocab()
    assert {"plain", "<pad>"} <= tokens.added.keys()
    assert (tokens.added["plain"].special, tokens.added["<pad>"].special) == (False, True)
    assert (tokens.added["plain"].normalized, tokens.added["<pad>"].normalized) == (True, False)
