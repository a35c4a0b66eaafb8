"""What lies beside the weights of the model that gives the config, or the tokenizer, is in the result;
and what is not the model's own is not.
"""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from folder_cases import CONFIG, family, recipe, write_family, write_model
from output_cases import folder_with, tree

from pymerge.checkpoint.companions import Limits, find_companions
from pymerge.engine.merge import merge_checkpoints, plan_checkpoints
from pymerge.engine.special_tokens import code_of
from pymerge.errors import CheckpointError, OutputError

WRITTEN = {"config.json", "model.safetensors", "README.md", "pymerge_manifest.json"}


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return write_family(tmp_path / "in", dtype=torch.float32)


@pytest.fixture
def config(folders: list[Path]) -> dict[str, Any]:
    return recipe("ties", folders, density=0.4)


def written(out: Path) -> set[str]:
    return {name for name, kind in tree(out).items() if kind != "folder"} - WRITTEN


OWN = (
    "modules.json",
    "1_Pooling/config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "image_processor/preprocessor_config.json",
    "a/b/c/deep.txt",
    "LICENSE",
    "USE_POLICY.md",
    "assets/logo.png",
    "modeling_toy.py",
    "toy/layers.py",
    "tokenizer.json.bak",
)


def test_everything_that_is_the_models_own(
    folders: list[Path], config: Any, tmp_path: Path
) -> None:
    folder_with(*OWN)(folders[0])
    folder_with("not.txt")(folders[1])
    summary = merge_checkpoints(config, tmp_path / "out")
    assert written(tmp_path / "out") == set(OWN)
    for name in OWN:
        assert (tmp_path / "out" / name).read_bytes() == (folders[0] / name).read_bytes()
    (note,) = [note for note in summary.notes if note.startswith("copied: ")]
    assert note.endswith(f"and {len(OWN) - 5} others from {folders[0]}"), "modeling_toy.py is usual"
    manifest = json.loads((tmp_path / "out" / "pymerge_manifest.json").read_text())
    assert set(OWN) < set(manifest["files"]) and set(OWN) < set(manifest["copied"])


def test_the_usual_files_of_one_model_need_no_note(folders: list[Path], config: Any) -> None:
    folder_with("chat_template.jinja", "modeling_toy.py", "vocab.txt")(folders[0])
    assert not any("copied" in note for note in plan_checkpoints(config).notes)


NOT_OWN = (
    "tf_model.h5",
    "flax_model.msgpack",
    "model.onnx",
    "pytorch_model.bin.index.json",
    "model.gguf",
    "optimizer.pt",
    "scheduler.pkl",
    "training_args.bin",
    "trainer_state.json",
    "train_results.json",
    "adapter_config.json",
    "quantize_config.json",
    "mergekit_config.yml",
    ".cache/huggingface/x.metadata",
    ".env",
    ".gitattributes",
    "__pycache__/x.pyc",
    "runs/Nov/events.out.tfevents.1",
    "wandb/config.yaml",
    "README.md",
)


def test_nothing_else(folders: list[Path], config: Any, tmp_path: Path) -> None:
    """Weights of other formats, caches, what is true of a training or of the making of that model."""
    folder_with(*NOT_OWN)(folders[0])
    summary = merge_checkpoints(config, tmp_path / "out")
    assert written(tmp_path / "out") == set()
    assert not any("copied" in note for note in summary.notes)
    assert written(tmp_path / "out") == set()


def test_what_is_left_out_is_told(folders: list[Path], config: Any, tmp_path: Path) -> None:
    base = folders[0]
    folder_with("onnx/model.onnx", "onnx/config.json", "2_Dense/config.json", "a/b/c/d/e/f.txt")(
        base
    )
    folder_with("checkpoint-5/inner/model.safetensors", "large.txt", "z1.txt", "z2.txt")(base)
    write_model(base / "2_Dense" / "0", {"w": torch.ones(1)})
    (base / "notes").write_bytes(pickle.dumps({"a": 1}))
    (base / "data.json").write_bytes(b"PK\x03\x04")
    (base / "setup.exe").write_bytes(b"x")
    (base / "link").symlink_to("a")
    os.mkfifo(base / "pipe")
    (base / "gone.txt").symlink_to("nowhere")
    (base / "large.txt").write_text("x" * ((16 << 20) + 1))
    summary = merge_checkpoints(config, tmp_path / "out")
    assert written(tmp_path / "out") == {"z1.txt", "z2.txt"}
    said = "\n".join(note for note in summary.notes if "not copied" in note)
    for names, why in (
        ("2_Dense/, checkpoint-5/, onnx/ are", "holds weights of its own, which are not merged"),
        ("data.json, notes are", "holds weights, pickles or a program, by its first bytes"),
        ("setup.exe is", "an archive or a program"),
        ("link/ is", "a link to a folder"),
        ("a/b/c/d/e/ is", "more than 4 folders deep"),
        ("pipe is", "is a named pipe, not a regular file"),
        ("gone.txt is", "is a link to nowhere, which is not there"),
        ("large.txt is", "more than 16777216 bytes"),
    ):
        assert f"{base}: {names} not copied ({why})" in said
    for limits, said in (
        (Limits(nbytes=5), "z2.txt is not copied (more than 5 bytes in all)"),
        (Limits(seen=3), "not copied (more than 3 entries in all)"),
        (Limits(files=6), "z2.txt is not copied (more than 6 files in all)"),
    ):
        assert said in str(find_companions(base, limits=limits).notes(base))


def test_a_single_file_has_nothing_beside_it(folders: list[Path], tmp_path: Path) -> None:
    folder_with("notes.txt")(folders[0])
    models = [{"model": str(f / "model.safetensors")} for f in folders[:1]]
    merge_checkpoints({"merge_method": "passthrough", "models": models}, tmp_path / "out")
    assert not (tmp_path / "out" / "notes.txt").exists()


# Whose is what is in an output folder.


def test_copies_are_replaced_as_long_as_they_are_copies(
    folders: list[Path], config: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    folder_with(*OWN)(folders[0])
    merge_checkpoints(config, out)
    (out / "1_Pooling" / "config.json").write_text("mine now")
    before = tree(out)
    with pytest.raises(OutputError, match=r"holds what no merge writes: 1_Pooling/config\.json"):
        merge_checkpoints(config, out, overwrite=True)
    assert tree(out) == before
    (out / "1_Pooling" / "config.json").write_bytes((folders[0] / OWN[1]).read_bytes())
    (out / "a" / "b" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds what no merge writes: a/b/mine\.txt"):
        merge_checkpoints(config, out, overwrite=True)
    (out / "a" / "b" / "mine.txt").unlink()
    for name in OWN[1:]:
        (folders[0] / name).unlink()
    merge_checkpoints(config, out, overwrite=True)
    assert written(out) == {OWN[0]} and not (out / "a").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}


def test_a_manifest_lists_copies_by_their_content(config: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    folder_with("thesis.txt", "model.safetensors", "x/y")(out)
    for copied in ({"thesis.txt": "0" * 64, "x/y": ""}, {"thesis.txt": 3}, ["thesis.txt"], 5):
        (out / "pymerge_manifest.json").write_text(json.dumps({"copied": copied}))
        with pytest.raises(OutputError, match=r"writes: thesis\.txt, x/"):
            merge_checkpoints(config, out, overwrite=True)


def test_an_interrupted_merge_with_folders_is_taken_up_again(
    folders: list[Path], config: Any, tmp_path: Path
) -> None:
    """Also where what is beside the weights is another by now."""
    out = tmp_path / "out"
    folder_with(*OWN)(folders[0])

    def stop(done: int, total: int, name: str) -> None:
        if 2 * done > total:
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            merge_checkpoints(config, out, out_shard_size=1500, progress=stop, resume=True)
        (folders[0] / "new").mkdir(exist_ok=True)
        (folders[0] / "new" / "x.txt").write_text("new")
        (folders[0] / "LICENSE").unlink(missing_ok=True)
    summary = merge_checkpoints(config, out, out_shard_size=1500, resume=True)
    assert summary.resumed > 0
    names = {name for name in written(out) if "model" not in name}
    assert names == {name for name in {*OWN, "new/x.txt"} if "model" not in name} - {"LICENSE"}


# Configs and tokenizers of two models.


def tokenizer(folder: Path, added: dict[str, int], **more: Any) -> None:
    words = {f"w{i}": i for i in range(37)}
    tokens = [{"id": i, "content": t, "special": True} for t, i in added.items()]
    whole = {"added_tokens": tokens, "model": {"type": "BPE", "vocab": words, "merges": []}}
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    (folder / "tokenizer_config.json").write_text(json.dumps(more))


def grown(folder: Path, rows: int, config: dict[str, Any]) -> Path:
    state = family(1, torch.float32)[1]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.cat([state[name], torch.ones(rows, 16)])
    return write_model(folder, state, {**CONFIG, **config})


def result(out: Path, name: str) -> Any:
    return json.loads((out / name).read_text())


# What the chat model says of its end, and what the base's configs are then.
ENDS: dict[str, tuple[dict[str, Any], dict[str, Any] | None, Any, Any]] = {
    "its own configs agree": ({"eos_token_id": [37, 2]}, {"eos_token_id": [37, 38]}, [37, 2], [37, 38]),
    "its own configs are another's": ({"eos_token_id": 2}, {"eos_token_id": 2}, 37, 37),
    "it has none": ({}, None, 37, 37),
}  # fmt: skip


@pytest.mark.parametrize("what", ENDS)
def test_the_special_tokens_of_the_tokenizer_go_into_the_configs(tmp_path: Path, what: str) -> None:
    own, generation, in_config, in_generation = ENDS[what]
    config = {**CONFIG, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": None}
    base = write_model(tmp_path / "base", family(0, torch.float32)[0], config)
    tokenizer(base, {}, eos_token="w2", bos_token="w1")
    (base / "generation_config.json").write_text('{"eos_token_id": 2, "top_k": 1}')
    chat = grown(tmp_path / "chat", 2, own)
    more = {"eos_token": {"content": "<|im_end|>"}, "bos_token": None, "pad_token": "<pad>"}
    tokenizer(chat, {"<|im_end|>": 37, "<pad>": 38}, **more)
    if generation is not None:
        (chat / "generation_config.json").write_text(json.dumps(generation))
    made = recipe("ties", [base, chat], density=0.5) | {"tokenizer_source": str(chat)}
    summary = merge_checkpoints(made, tmp_path / "out")
    found = result(tmp_path / "out", "config.json")
    assert found["eos_token_id"] == in_config
    assert found["bos_token_id"] == 1 and found["pad_token_id"] == 38
    found = result(tmp_path / "out", "generation_config.json")
    assert found == {"eos_token_id": in_generation, "pad_token_id": 38, "top_k": 1}
    assert any(
        "eos_token_id of config.json and generation_config.json is" in n for n in summary.notes
    )
    made["tokenizer_source"] = "base"
    merge_checkpoints(made, tmp_path / "other")
    assert result(tmp_path / "other", "config.json")["eos_token_id"] == 2
    assert result(tmp_path / "other", "generation_config.json")["eos_token_id"] == 2


def test_several_ends_are_kept_beside_the_tokenizers(tmp_path: Path) -> None:
    config = {**CONFIG, "text_config": {"eos_token_id": 3, "pad_token_id": 0}}
    base = write_model(tmp_path / "base", family(0, torch.float32)[0], config)
    tokenizer(base, {})
    (base / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    chat = grown(tmp_path / "chat", 1, {})
    tokenizer(chat, {"<end>": 37})
    (chat / "special_tokens_map.json").write_text('{"eos_token": "<end>", "pad_token": "<gone>"}')
    made = recipe("ties", [base, chat], density=0.5) | {"tokenizer_source": str(chat)}
    merge_checkpoints(made, tmp_path / "out")
    assert result(tmp_path / "out", "generation_config.json")["eos_token_id"] == [37, 2, 3]
    found = result(tmp_path / "out", "config.json")
    assert found["text_config"]["eos_token_id"] == 37 and found["text_config"]["pad_token_id"] == 0
    assert "eos_token_id" not in found


def test_the_code_of_the_tokenizer_comes_with_it(
    folders: list[Path], config: Any, tmp_path: Path
) -> None:
    base, chat = folders[:2]
    for folder in (base, chat):
        tokenizer(folder, {})
    code = {"tokenization_x.py": "from .helper_x import a\nfrom . import more_x\nimport json\n"}
    code |= {"helper_x.py": "from .tokenization_x import X\n", "more_x.py": "", "train.py": ""}
    for name, text in code.items():
        (chat / name).write_text(text)
    (base / "helper_x.py").write_text("# the base's")
    (base / "modeling_x.py").write_text("")
    named = {"AutoTokenizer": ["tokenization_x.Slow", None], "AutoProcessor": "a/b--other.Y"}
    tokenizer(chat, {}, auto_map=named)
    summary = merge_checkpoints(config | {"tokenizer_source": str(chat)}, tmp_path / "out")
    wanted = {"tokenizer.json", "tokenizer_config.json", "modeling_x.py", "helper_x.py"}
    assert written(tmp_path / "out") == {*wanted, "tokenization_x.py", "more_x.py"}
    assert (tmp_path / "out" / "helper_x.py").read_text() == code["helper_x.py"]
    notes = "\n".join(summary.notes)
    assert "helper_x.py differs between the models that give the config and the tokenizer" in notes
    assert f"copied: tokenizer.json, tokenizer_config.json, helper_x.py, more_x.py and 1 other from {chat}" in notes  # fmt: skip


def test_a_quantization_config_beside_weights_of_16_bits(tmp_path: Path) -> None:
    said = {"quantization_config": {"load_in_4bit": True}}
    whole = {**CONFIG, **said, "text_config": {"a": 1, "quantization": {"bits": 4}}, "last": 1}
    folders = [write_model(tmp_path / f"m{k}", s, whole) for k, s in enumerate(family())]
    summary = merge_checkpoints(recipe("linear", folders), tmp_path / "out")
    found = result(tmp_path / "out", "config.json")
    assert found["text_config"] == {"a": 1} and "quantization_config" not in found
    assert found["last"] == 1
    (note,) = [note for note in summary.notes if "not quantized" in note]
    assert "though quantization_config, quantization says so" in note and str(folders[1]) in note
    (folders[1] / "config.json").write_text("{}")
    (folders[1] / "quantize_config.json").write_text("{}")
    summary = merge_checkpoints(recipe("linear", folders), tmp_path / "other")
    assert any("though quantize_config.json says so" in note for note in summary.notes)
    assert not (tmp_path / "other" / "quantize_config.json").exists()


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "pymerge_manifest.json",
        "merge_report.txt",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
    ],
)
def test_a_folder_by_the_name_of_a_file_that_is_written(
    folders: list[Path], config: Any, tmp_path: Path, name: str
) -> None:
    folder_with(f"{name}/notes.txt")(folders[0])
    summary = merge_checkpoints(config, tmp_path / "out", out_shard_size=6000)
    assert len(summary.files) == 2
    why = "a folder by the name of a file that merges write"
    assert f"{folders[0]}: {name}/ is not copied ({why})" in summary.notes


def test_a_file_of_one_model_where_another_has_a_folder(tmp_path: Path) -> None:
    folders = write_family(tmp_path / "in", dtype=torch.float32)
    for folder in folders:
        tokenizer(folder, {})
    folder_with("additional_chat_templates")(folders[0])
    folder_with("additional_chat_templates/tool.jinja")(folders[1])
    config = recipe("ties", folders, density=0.4) | {"tokenizer_source": str(folders[1])}
    summary = merge_checkpoints(config, tmp_path / "out")
    assert "additional_chat_templates/tool.jinja" in written(tmp_path / "out")
    assert any("additional_chat_templates is not copied" in note for note in summary.notes)


@pytest.mark.parametrize("name", ["a" * 255, "a" * 252 + ".py", "b" * 255 + "/" + "ü" * 127])
def test_the_longest_names(folders: list[Path], config: Any, tmp_path: Path, name: str) -> None:
    """A file is written by another name first, which has to have room too."""
    folder_with(name)(folders[0])
    merge_checkpoints(config, tmp_path / "out")
    assert written(tmp_path / "out") == {name}
    assert merge_checkpoints(config, tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("out", [None, 3, b"out", ["out"]])
def test_an_output_that_is_no_path(config: Any, out: Any) -> None:
    with pytest.raises(TypeError, match=r"^out is an? \w+; pass the path of a folder"):
        merge_checkpoints(config, out)


def test_a_link_to_what_no_name_can_be(folders: list[Path], config: Any, tmp_path: Path) -> None:
    """To ask whether it is a folder is an error of its own."""
    (folders[0] / "link").symlink_to("a" * 300)
    summary = merge_checkpoints(config, tmp_path / "out")
    assert any("link is not copied (cannot be opened" in note for note in summary.notes)
    for name in ("toy.py", "tokenizer.json", "config.json", "additional_chat_templates"):
        path = folders[0] / name
        path.unlink(missing_ok=True)
        path.symlink_to("a" * 300)
        if name == "additional_chat_templates":
            (folders[0] / "config.json").unlink()
            assert plan_checkpoints(config)
            continue
        with pytest.raises(CheckpointError, match=f"{name}: cannot be opened"):
            merge_checkpoints(config, tmp_path / "out", overwrite=True)
        if name != "config.json":
            path.unlink()


@pytest.mark.parametrize(
    "text", ["\n" * 300_000, " " * 300_000, "from ." + "a" * 300_000, "from .a" + ".b" * 150_000]
)
def test_code_of_a_tokenizer_is_searched_in_one_pass(tmp_path: Path, text: str) -> None:
    (tmp_path / "tok.py").write_text(f"from .one import x\n{text}\n  from.two import y\n")
    for name in ("one.py", "two.py"):
        (tmp_path / name).touch()
    config = json.dumps({"auto_map": {"AutoTokenizer": ["tok.Tok", None]}}).encode()
    found = code_of(tmp_path, {"tokenizer_config.json": config})
    assert found == ["one.py", "tok.py", "two.py"]
