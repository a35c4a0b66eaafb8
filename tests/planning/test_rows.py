"""Rows of embeddings moved to the ids of the result's tokenizer (docs/spec/rows.md), against models
whose rows were moved before.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from folder_cases import CONFIG, assert_same, merge_in, read_result, write_model
from host_device import HostDevice
from safetensors.torch import save_file
from token_cases import (
    METHODS,
    ROWS,
    TABLES,
    VOCABULARIES,
    WORDS,
    chosen,
    configured,
    ids_of,
    states_of,
    write_both,
    write_tokenizer,
)

from pymerge.engine.merge import merge_checkpoints, plan_checkpoints
from pymerge.engine.sizes import Sizes
from pymerge.errors import CheckpointError, DiskFullError, MismatchError
from pymerge.planning.vocabulary import is_vocabulary


@pytest.mark.parametrize("source", [0, 1])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", VOCABULARIES)
def test_as_if_moved_before(tmp_path: Path, case: str, method: str, source: int) -> None:
    folders, wanted = write_both(tmp_path, *VOCABULARIES[case], source)
    config = configured(method, folders, tokenizer_source=chosen(folders, source))
    merge_checkpoints(config, tmp_path / "out", seed=3)
    merge_checkpoints(configured(method, wanted), tmp_path / "wanted", seed=3)
    assert_same(read_result(tmp_path / "out"), read_result(tmp_path / "wanted"))
    given = (folders[source] / "tokenizer.json").read_bytes()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == given
    rows = max(VOCABULARIES[case][0][source].values()) + 1
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == rows


@pytest.mark.parametrize("way", ["mmap", "read"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", ["added to both", "all permuted"])
def test_larger_than_memory_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, method: str, way: str
) -> None:
    """Gathered into a file on the disk, and in pieces that begin within a row."""
    monkeypatch.setenv("PYMERGE_IO", way)
    folders, wanted = write_both(tmp_path, *VOCABULARIES[case], 1)
    config = configured(method, folders, tokenizer_source=str(folders[1]))
    merge_in(Sizes(ring=384, piece=56, anonymous=0), config, tmp_path / "out", out_shard_size=2000)
    monkeypatch.undo()
    merge_checkpoints(configured(method, wanted), tmp_path / "wanted", out_shard_size=2000)
    assert_same(read_result(tmp_path / "out"), read_result(tmp_path / "wanted"))
    assert [p for p in tmp_path.iterdir() if "partial" in p.name] == []


@pytest.mark.parametrize("memory", [1 << 20, 5 << 10])
@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties"])
def test_on_a_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, memory: int
) -> None:
    """The same files; with little memory in parts, after thresholds that the host finds."""
    made = HostDevice("any")
    monkeypatch.setattr("pymerge.engine.merge.open_device", lambda index: made)
    folders, _ = write_both(tmp_path, *VOCABULARIES["added to both"], 1)
    config = configured(method, folders, tokenizer_source=str(folders[1]))
    merge_checkpoints(config, tmp_path / "cpu")
    on_disk = Sizes(anonymous=0)
    merge_in(on_disk, config, tmp_path / "gpu", device="cuda", device_memory=memory)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "gpu" / name).read_bytes() == (tmp_path / "cpu" / name).read_bytes()
    assert not [t for t in threading.enumerate() if t.name.startswith("pymerge-")]


@pytest.mark.parametrize(
    "dtypes",
    [
        [torch.float32, torch.bfloat16, torch.float16],
        [torch.bfloat16, torch.float32, torch.bfloat16],
        [torch.float16, torch.bfloat16, torch.float16],
    ],
)
@pytest.mark.parametrize("case", ["added to both", "renamed"])
def test_rows_of_other_dtypes_are_widened(
    tmp_path: Path, case: str, dtypes: list[torch.dtype]
) -> None:
    folders, wanted = write_both(tmp_path, *VOCABULARIES[case], 1, dtypes)
    config = configured("ties", folders, tokenizer_source=str(folders[1]))
    merge_checkpoints(config, tmp_path / "out")
    merge_checkpoints(configured("ties", wanted), tmp_path / "wanted")
    assert_same(read_result(tmp_path / "out"), read_result(tmp_path / "wanted"))
    del config["out_dtype"]
    merge_checkpoints(config, tmp_path / "own")
    assert {t.dtype for t in read_result(tmp_path / "own").values()} == {dtypes[0]}


def test_pickled_models(tmp_path: Path) -> None:
    """Also tensors that are not contiguous."""
    folders, wanted = write_both(tmp_path, *VOCABULARIES["all permuted"], 2)
    for folder in folders:
        state = read_result(folder)
        turned = {n: t.t().contiguous().t() if t.dim() == 2 else t for n, t in state.items()}
        torch.save(turned, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    merge_checkpoints(
        configured("ties", folders, tokenizer_source=str(folders[2])), tmp_path / "out"
    )
    merge_checkpoints(configured("ties", wanted), tmp_path / "wanted")
    assert_same(read_result(tmp_path / "out"), read_result(tmp_path / "wanted"))


@pytest.mark.parametrize("source", [0, 1])
def test_a_model_with_other_names(tmp_path: Path, source: int) -> None:
    folders, wanted = write_both(tmp_path, *VOCABULARIES["added to both"], source)
    state = {f"_orig_mod.{name}": tensor for name, tensor in read_result(folders[1]).items()}
    save_file(state, folders[1] / "model.safetensors")
    config = configured("ties", folders, tokenizer_source=chosen(folders, source))
    merge_checkpoints(config, tmp_path / "out")
    merge_checkpoints(configured("ties", wanted), tmp_path / "wanted")
    assert_same(read_result(tmp_path / "out"), read_result(tmp_path / "wanted"))


def test_nothing_is_gathered_where_the_ids_agree(tmp_path: Path) -> None:
    vocabularies = [ids_of(WORDS), ids_of(WORDS), {w: i for i, w in reversed([*enumerate(WORDS)])}]
    folders, _ = write_both(tmp_path, vocabularies, [0, 0, 0], 0)
    plan = plan_checkpoints(configured("ties", folders, tokenizer_source="base"))
    assert plan.problems == () and plan.notes == ()
    assert all(source.rows is None for tensor in plan.tensors for source in tensor.inputs)


def test_padding_is_cut_off_where_it_lies(tmp_path: Path) -> None:
    """The first rows of a table need no copy."""
    folders, _ = write_both(tmp_path, [ids_of(WORDS)] * 3, [5, 5, 0], 0)
    plan = plan_checkpoints(configured("ties", folders, tokenizer_source="base"))
    assert plan.tensors[0].shape == (ROWS, 16)
    from pymerge.checkpoint.inputs import Inputs, open_models

    models = open_models(plan.models)
    stored = Inputs(models)
    inputs = [stored(source) for tensor in plan.tensors for source in tensor.inputs]
    assert all(each.in_place for each in inputs)
    for model in models:
        model.close()


@pytest.mark.parametrize("source", [0, 1])
@pytest.mark.parametrize("more", [[0, 0, 0], [11, 8, 8]], ids=["new", "in place of the models'"])
def test_padding_to_a_multiple(tmp_path: Path, more: list[int], source: int) -> None:
    """V5: the mean of a model's rows, also where a model is as large as the result."""
    vocabularies, _ = VOCABULARIES["added to both"]
    folders, wanted = write_both(tmp_path, vocabularies, more, source, [torch.float32] * 3)
    for folder in wanted:
        state = read_result(folder)
        for name in TABLES:
            mean = state[name].double().mean(0, keepdim=True).float()
            state[name] = torch.cat([state[name], mean.expand(-len(state[name]) % 16, -1)])
        write_model(folder.with_name(f"{folder.name}-padded"), state)
    wanted = [folder.with_name(f"{folder.name}-padded") for folder in wanted]
    tokenizer = {"source": chosen(folders, source), "pad_to_multiple_of": 16}
    config = configured("linear", folders, tokenizer=tokenizer)
    merge_checkpoints(config, tmp_path / "out")
    merge_checkpoints(configured("linear", wanted), tmp_path / "wanted")
    assert_same(read_result(tmp_path / "out"), read_result(tmp_path / "wanted"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 48


def test_a_model_without_tokenizer_has_the_bases(tmp_path: Path) -> None:
    vocabularies, more = VOCABULARIES["all permuted"]
    folders, wanted = write_both(tmp_path, [*vocabularies[:2], vocabularies[0]], more, 1)
    (folders[2] / "tokenizer.json").unlink()
    merge_checkpoints(
        configured("ties", folders, tokenizer_source=str(folders[1])), tmp_path / "out"
    )
    merge_checkpoints(configured("ties", wanted), tmp_path / "wanted")
    assert_same(read_result(tmp_path / "out"), read_result(tmp_path / "wanted"))


def test_a_tokenizer_of_none_of_the_models(tmp_path: Path) -> None:
    folders, wanted = write_both(tmp_path, *VOCABULARIES["added to one"], 1)
    config = configured("ties", [folders[0], folders[2]], tokenizer_source=str(folders[1]))
    plan = plan_checkpoints(config)
    assert (
        "2 tokens ('<a>', '<b>') of the result in no model that is merged, with rows of zeros"
        in str(plan.notes)
    )
    merge_checkpoints(config, tmp_path / "out")
    result = read_result(tmp_path / "out")
    for name in TABLES:
        assert (result[name][ROWS:] == 0).all() and len(result[name]) == ROWS + 2
    merge_checkpoints(configured("ties", [wanted[0], wanted[2]]), tmp_path / "wanted")
    same = read_result(tmp_path / "wanted")
    others = [name for name in same if name not in TABLES]
    assert_same({n: result[n] for n in others}, {n: same[n] for n in others})


@pytest.mark.parametrize("beside", ["nothing", "an adapter", "a config", "shards without index"])
def test_a_tokenizer_without_a_model(tmp_path: Path, beside: str) -> None:
    """As with a model of that tokenizer that is not merged."""
    folders, _ = write_both(tmp_path, *VOCABULARIES["added to one"], 1)
    config = configured("ties", [folders[0], folders[2]], tokenizer_source=str(folders[1]))
    merge_checkpoints(config, tmp_path / "wanted")
    alone = tmp_path / "alone"
    alone.mkdir()
    write_tokenizer(alone, VOCABULARIES["added to one"][0][1])
    if beside == "a config":
        (alone / "config.json").write_text("{}")
    elif beside != "nothing":
        name = "adapter_model" if beside == "an adapter" else "model-00001-of-00002"
        save_file({"q.lora_A.weight": torch.ones(2, 2)}, alone / f"{name}.safetensors")
    for key in ({"tokenizer_source": str(alone)}, {"tokenizer": {"source": str(alone)}}):
        made = {**configured("ties", [folders[0], folders[2]]), **key}
        merge_checkpoints(made, tmp_path / "out", overwrite=True)
        assert_same(read_result(tmp_path / "out"), read_result(tmp_path / "wanted"))
        source, copied = (alone / "tokenizer.json", tmp_path / "out" / "tokenizer.json")
        assert copied.read_bytes() == source.read_bytes()
    (alone / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="alone: holds"):
        plan_checkpoints(made)
    write_tokenizer(alone, VOCABULARIES["added to one"][0][1])
    made["models"].append({"model": str(alone), "parameters": {"weight": 1}})
    with pytest.raises(CheckpointError, match="alone: holds"):  # it is one of the models
        plan_checkpoints(made)


def test_rows_that_are_cut_off_are_told(tmp_path: Path) -> None:
    vocabularies, more = VOCABULARIES["padded"]
    folders, _ = write_both(tmp_path, vocabularies, more, 1)
    config = configured("ties", folders, tokenizer_source=str(folders[1]))
    said = "\n".join(plan_checkpoints(config).notes)
    assert (
        f"{folders[0]}, to the tokenizer of {folders[1]}: 1 token ('<a>') that it lacks is" in said
    )
    assert said.count("cut off as padding") == 2
    assert "is given a row; 2 rows beyond its tokens cut off as padding" in said  # 23 of 21
    assert (
        f"{folders[1]}, to the tokenizer of {folders[1]}: 7 rows beyond its tokens cut off" in said
    )
    config["tokenizer"] = {"source": config.pop("tokenizer_source"), "pad_to_multiple_of": 32}
    assert "cut off" not in str(plan_checkpoints(config).notes)


def test_tied_weights(tmp_path: Path) -> None:
    """A model that ties its head gives rows of its embedding; a base that does has no head in the
    result.
    """
    vocabularies, more = VOCABULARIES["added to one"]
    folders, wanted = write_both(tmp_path, vocabularies, more, 1)
    for folder in (folders[1], wanted[1]):
        state = read_result(folder)
        del state["lm_head.weight"]
        tied = write_model(folder.with_name(folder.name + "t"), state, {**CONFIG, "tie_word_embeddings": True})  # fmt: skip
        write_tokenizer(tied, vocabularies[1])
    folders[1], wanted[1] = (f[1].with_name(f[1].name + "t") for f in (folders, wanted))
    merge_checkpoints(
        configured("ties", folders, tokenizer_source=str(folders[1])), tmp_path / "out"
    )
    # The head's rows that the base lacks are the embedding's of the tied model.
    state = read_result(wanted[0])
    state["lm_head.weight"][ROWS:] = read_result(folders[1])["model.embed_tokens.weight"][ROWS:]
    wanted[0] = write_model(tmp_path / "again", state)
    state = read_result(wanted[2])
    state["lm_head.weight"][ROWS:] = read_result(folders[1])["model.embed_tokens.weight"][ROWS:]
    wanted[2] = write_model(tmp_path / "again2", state)
    merge_checkpoints(configured("ties", wanted), tmp_path / "wanted")
    assert_same(read_result(tmp_path / "out"), read_result(tmp_path / "wanted"))


def test_ids_in_the_configs_move(tmp_path: Path) -> None:
    vocabularies = [ids_of(["<s>", "</s>", *WORDS]), ids_of([*WORDS, "</s>", "<|im_end|>"])]
    states = states_of(vocabularies, [0, 0], [torch.float32] * 2)
    config = {**CONFIG, "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": None, "vocab_size": 9}
    folders = [write_model(tmp_path / f"m{k}", s, config) for k, s in enumerate(states)]
    for folder, ids in zip(folders, vocabularies, strict=True):
        write_tokenizer(folder, ids)
    (folders[0] / "generation_config.json").write_text('{"eos_token_id": [1, 0], "top_k": 1}')
    merge = configured("ties", folders, tokenizer_source=str(folders[1]))
    merge_checkpoints(merge, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found["eos_token_id"] == ROWS and found["bos_token_id"] is None
    assert found["pad_token_id"] is None and found["vocab_size"] == ROWS + 2
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert found == {"eos_token_id": [ROWS], "top_k": 1}
    merge_checkpoints({**merge, "tokenizer_source": "base"}, tmp_path / "base")
    found = json.loads((tmp_path / "base" / "config.json").read_text())
    assert found["eos_token_id"] == 1 and found["vocab_size"] == ROWS + 2


def test_ids_in_the_configs_of_rows_with_two_names(tmp_path: Path) -> None:
    folders, _ = write_both(tmp_path, *VOCABULARIES["two names"], 1)
    for folder in folders:
        (folder / "config.json").write_text(json.dumps({**CONFIG, "eos_token_id": 5}))
    (folders[1] / "generation_config.json").write_text('{"eos_token_id": [5, 6], "top_k": 1}')
    config = {**configured("linear", folders), "tokenizer_source": str(folders[1])}
    merge_checkpoints(config, tmp_path / "kept")  # the config is that of base_model
    assert json.loads((tmp_path / "kept" / "config.json").read_text())["eos_token_id"] == 5
    del config["base_model"]
    merge_checkpoints(config, tmp_path / "own")  # and here of m1
    for name, wanted in (("config.json", 5), ("generation_config.json", [5, 6])):
        assert json.loads((tmp_path / "own" / name).read_text())["eos_token_id"] == wanted
    write_tokenizer(folders[2], ids_of([w for w in WORDS if w not in ("w5", "w6")]))
    merge_checkpoints({**config, "tokenizer_source": str(folders[2])}, tmp_path / "gone")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "gone" / name).read_text())["eos_token_id"] is None


def test_resume(tmp_path: Path) -> None:
    """The row maps are part of what an interrupted merge was."""
    folders, _ = write_both(tmp_path, *VOCABULARIES["all permuted"], 1)
    config = configured("ties", folders, tokenizer_source=str(folders[1]))
    merge_checkpoints(config, tmp_path / "whole", out_shard_size=2000)
    calls = []

    def interrupt(*_: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_checkpoints(config, tmp_path / "out", out_shard_size=2000, progress=interrupt)
    summary = merge_checkpoints(config, tmp_path / "out", out_shard_size=2000, resume=True)
    assert summary.resumed
    assert_same(read_result(tmp_path / "out"), read_result(tmp_path / "whole"))

    with pytest.raises(KeyboardInterrupt):
        calls.clear()
        merge_checkpoints(config, tmp_path / "two", out_shard_size=2000, progress=interrupt)
    ids = VOCABULARIES["all permuted"][0][2]
    write_tokenizer(folders[2], {**ids, "w1": ids["w2"], "w2": ids["w1"]})
    with pytest.raises(Exception, match="was another one"):
        merge_checkpoints(config, tmp_path / "two", out_shard_size=2000, resume=True)


def test_progress_ends_at_all_bytes(tmp_path: Path) -> None:
    folders, _ = write_both(tmp_path, *VOCABULARIES["added to both"], 1, [torch.float32, torch.bfloat16, torch.float16])  # fmt: skip
    config = configured("ties", folders, tokenizer_source=str(folders[1]))
    seen: list[tuple[int, int, str]] = []
    merge_checkpoints(config, tmp_path / "out", progress=lambda *a: seen.append(a))
    assert seen[-1][0] == seen[-1][1]


def test_room_for_the_gathered_rows_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def check_space(self: Any, needed: int) -> None:
        asked.append(needed)
        raise DiskFullError("full")

    monkeypatch.setattr("pymerge.checkpoint.folder.OutputFolder.check_space", check_space)
    monkeypatch.setenv("PYMERGE_IO", "mmap")  # what is read takes room for itself
    folders, wanted = write_both(tmp_path, *VOCABULARIES["all permuted"], 1)
    for method in ("ties", "task_arithmetic"):
        for config in (
            configured(method, folders, tokenizer_source=str(folders[1])),
            configured(method, wanted),
        ):
            with pytest.raises(DiskFullError):
                merge_checkpoints(config, tmp_path / "out")
    # m1's rows stay; those of the others are needed together, and only for thresholds.
    assert asked[0] - asked[1] == 2 * ROWS * 16 * 2
    assert asked[2] == asked[3]


# What is refused


def problems(config: Any) -> str:
    return "\n".join(plan_checkpoints(config).problems)


def test_no_tokenizer_to_move_to(tmp_path: Path) -> None:
    folders, _ = write_both(tmp_path, *VOCABULARIES["permuted"], 0)
    (folders[0] / "tokenizer.json").unlink()
    text = problems(configured("ties", folders, tokenizer_source="base"))
    assert f"{folders[0]}, which has no tokenizer files" in text


def test_ids_that_cannot_be_read(tmp_path: Path) -> None:
    folders, _ = write_both(tmp_path, *VOCABULARIES["permuted"], 0)
    config = configured("ties", folders, tokenizer_source="base")
    (folders[1] / "tokenizer.json").unlink()
    (folders[1] / "tokenizer.model").write_bytes(b"pieces")
    assert f"tokens of {folders[1]} are not in files that can be read" in problems(config)
    for folder in folders:
        (folder / "tokenizer.json").unlink(missing_ok=True)
        (folder / "tokenizer.model").write_bytes(b"pieces")
    assert problems(config) == ""
    (folders[2] / "tokenizer.model").write_bytes(b"others")
    assert "save its tokenizer as tokenizer.json" in problems(config)


def test_ids_that_no_model_has_rows_for(tmp_path: Path) -> None:
    folders, _ = write_both(tmp_path, *VOCABULARIES["permuted"], 0)
    config = configured("ties", folders, tokenizer_source=str(folders[1]))
    write_tokenizer(folders[1], {"w1": 1 << 30, "w2": 1 << 29})
    text = problems(config)
    assert (
        f"no row for any id of its tokenizer: {ROWS} rows, and the lowest id is {1 << 29}" in text
    )
    write_tokenizer(folders[1], {**VOCABULARIES["permuted"][0][1], "more": (1 << 31) - 1})
    assert problems(config) == ""
    # Without a table of a known name there is nothing to move, and no room for such ids is made.
    for folder in folders:
        (folder / "model.safetensors").unlink()
        save_file({"blob": torch.zeros(4, 4)}, folder / "model.safetensors")
    assert "tokenizers differ" in problems(config)


def test_a_table_of_another_name_is_not_merged_as_it_is(tmp_path: Path) -> None:
    folders, _ = write_both(tmp_path, *VOCABULARIES["permuted"], 0)
    for folder in folders:
        state = read_result(folder)
        state["model.ngram_table.weight"] = torch.zeros(ROWS, 4)
        state["final_logits_bias"] = torch.zeros(1, ROWS)
        (folder / "model.safetensors").unlink()
        write_model(folder.with_name(folder.name + "x"), state)
        (folder / "tokenizer.json").rename(folder.with_name(folder.name + "x") / "tokenizer.json")
    folders = [folder.with_name(folder.name + "x") for folder in folders]
    assert not is_vocabulary("model.layers.3.mlp.shared.weight") and is_vocabulary("shared.weight")
    text = problems(configured("ties", folders, tokenizer_source="base"))
    assert f"model.ngram_table.weight [{ROWS}, 4] are as large as the vocabulary" in text
    assert "final_logits_bias" in text and "embed_tokens" not in text
    assert text.count("as large as the vocabulary") == 1


def added_to(
    root: Path, vocabularies: list[dict[str, int]], more: Mapping[str, tuple[int, ...]]
) -> list[Path]:
    """Models with further tensors."""
    states = states_of(vocabularies, [0] * len(vocabularies), [torch.float32] * len(vocabularies))
    folders = []
    for k, (state, ids) in enumerate(zip(states, vocabularies, strict=True)):
        extra = {name: torch.ones(shape) for name, shape in more.items()}
        folders.append(write_model(root / f"m{k}", state | extra))
        write_tokenizer(folders[-1], ids)
    return folders


MLPS = {
    "linear": {"up.weight": (ROWS, 16), "up.bias": (ROWS,), "down.weight": (16, ROWS)},
    "conv1d": {"c_fc.weight": (16, ROWS), "c_fc.bias": (ROWS,), "c_proj.weight": (ROWS, 16)},
    "attention": {"q_proj.weight": (ROWS, 16), "o_proj.weight": (16, ROWS)},
    "experts": {f"experts.{i}.up.weight": (ROWS, 16) for i in range(2)}
    | {f"experts.{i}.down.weight": (16, ROWS) for i in range(2)},
}


@pytest.mark.parametrize("what", MLPS)
def test_an_mlp_as_large_as_the_vocabulary_has_no_row_a_token(tmp_path: Path, what: str) -> None:
    """What it makes, the next layer of it takes, in the same layer of the model."""
    more = {f"model.layers.1.block.{name}": shape for name, shape in MLPS[what].items()}
    permuted = VOCABULARIES["permuted"][0]
    folders = added_to(tmp_path, permuted, more)
    assert problems(configured("ties", folders, tokenizer_source="base")) == ""
    # A table in a layer is one, and so is one outside that all models have as many rows of.
    for name in ("model.layers.1.ngram.weight", "ngram.weight"):
        folders = added_to(tmp_path / name, permuted, {name: (ROWS, 5)})
        text = problems(configured("ties", folders, tokenizer_source="base"))
        assert f"{name} [{ROWS}, 5] is as large as the vocabulary" in text


def test_a_tensor_of_one_size_in_models_of_several_has_no_row_a_token(tmp_path: Path) -> None:
    more = {"projector.weight": (ROWS, 16), "norm.weight": (ROWS + 2,)}
    folders = added_to(tmp_path, VOCABULARIES["added to one"][0], more)
    for source in (0, 1):
        config = configured("ties", folders, tokenizer_source=chosen(folders, source))
        assert problems(config) == ""


def test_many_tables_of_another_name_are_one_problem(tmp_path: Path) -> None:
    folders, _ = write_both(tmp_path, *VOCABULARIES["permuted"], 0)
    for folder in folders:
        state = read_result(folder)
        state |= {f"tables.{i}.weight": torch.zeros(ROWS, 4) for i in range(64)}
        (folder / "model.safetensors").unlink()
        save_file(state, folder / "model.safetensors")
    text = problems(configured("ties", folders, tokenizer_source="base"))
    assert text.count("as large as the vocabulary") == 1 and "and 60 others are" in text


def test_rows_of_other_widths_are_told_with_the_shapes(tmp_path: Path) -> None:
    folders, _ = write_both(tmp_path, *VOCABULARIES["permuted"], 0)
    state = read_result(folders[2])
    state[TABLES[0]] = state[TABLES[0]][:, :8].clone()
    (folders[2] / "model.safetensors").unlink()
    (folders[2] / "tokenizer.json").unlink()
    (folders[2] / "config.json").unlink()
    folders[2].rmdir()
    write_model(folders[2], state)
    text = problems(configured("ties", folders, tokenizer_source="base"))
    assert "shapes differ in 1 tensor: model.embed_tokens.weight is" in text


def test_dtypes_that_nothing_can_be_computed_in(tmp_path: Path) -> None:
    folders, _ = write_both(tmp_path, *VOCABULARIES["permuted"], 0)
    state = read_result(folders[1])
    state[TABLES[0]] = state[TABLES[0]].to(torch.float8_e4m3fn)
    (folders[1] / "model.safetensors").unlink()
    torch.save(state, folders[1] / "pytorch_model.bin")
    text = problems(configured("ties", folders, tokenizer_source="base"))
    assert "is float8_e4m3fn, whose rows cannot be moved" in text


def test_left_out_the_models_are_compared(tmp_path: Path) -> None:
    folders, _ = write_both(tmp_path, *VOCABULARIES["permuted"], 0)
    with pytest.raises(MismatchError, match="give tokenizer_source"):
        merge_checkpoints(configured("ties", folders), tmp_path / "out")


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "x", 1 << 20])
def test_bad_multiples(tmp_path: Path, value: Any) -> None:
    from pymerge.errors import ConfigError

    folders, _ = write_both(tmp_path, *VOCABULARIES["permuted"], 0)
    tokenizer = {"source": "base", "pad_to_multiple_of": value}
    with pytest.raises(ConfigError, match=r"pad_to_multiple_of.*whole number from 1"):
        plan_checkpoints(configured("ties", folders, tokenizer=tokenizer))
