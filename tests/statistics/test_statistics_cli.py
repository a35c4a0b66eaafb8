"""`pymerge stats` on tiny transformers folders."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import statistics_cases as cases
import torch

from pymerge.cli.stats import main
from pymerge.statistics import KINDS, collect, load
from pymerge.statistics._models import load_model, stored_name, task_of
from pymerge.statistics._text import Example, TextBatches, label_numbers, read_examples

transformers = pytest.importorskip("transformers")

WORDS = [f"w{i}" for i in range(24)]
TEXTS = [" ".join(WORDS[(3 * i + j) % 24] for j in range(2 + i % 5)) for i in range(11)]


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="[PAD]", mask_token="[MASK]", unk_token="[UNK]"
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A classifier, its bare encoder, a masked and a causal language model, and data for them."""
    root = tmp_path_factory.mktemp("models")
    classifier = cases.bert().float()
    causal = cases.llama().float()
    masked = transformers.BertForMaskedLM(classifier.config).eval()
    models = {
        "classifier": classifier,
        "encoder": classifier.bert,
        "causal": causal,
        "masked": masked,
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
        tokenizer().save_pretrained(root / name)
    (root / "texts.txt").write_text("\n\n".join(TEXTS) + "\n", encoding="utf-8")
    lines = [json.dumps({"text": text, "label": i % 3}) for i, text in enumerate(TEXTS)]
    (root / "labelled.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return {name: root / name for name in (*models, "texts.txt", "labelled.jsonl")}


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_classifier_with_given_labels(folders, tmp_path, capsys):
    out = tmp_path / "s.safetensors"
    arguments = [folders["classifier"], folders["labelled.jsonl"], "--out", out, "--device", "cpu"]
    assert (
        run(*arguments, "--labels", "empirical", "--kinds", ",".join(KINDS), "--batch-size", 4) == 0
    )
    assert "11 examples" in capsys.readouterr().out
    found = load(out)
    model = transformers.BertForSequenceClassification.from_pretrained(folders["classifier"])
    batch = dict(tokenizer()(TEXTS, padding=True, return_tensors="pt"))
    batch.pop("token_type_ids", None)
    batch["labels"] = torch.arange(11) % 3
    truth = collect(model, [batch], loss="sequence-classification", labels="empirical", kinds=KINDS)
    assert sorted(found.header["tensors"]) == sorted(truth.header["tensors"])
    for key, counts in truth.header["tensors"].items():
        assert found.header["tensors"][key] == counts
        torch.testing.assert_close(found._read(key), truth._read(key), rtol=1e-3, atol=1e-6)
    assert found.header["model"]["name"] == "classifier"


@pytest.mark.parametrize(
    ("name", "task"),
    [("causal", "causal-lm"), ("masked", "masked-lm"), ("classifier", "sequence-classification")],
)
def test_the_task_is_the_architectures(folders, tmp_path, capsys, name, task):
    out = tmp_path / "s.safetensors"
    assert run(folders[name], folders["texts.txt"], "--out", out, "--device", "cpu") == 0
    assert f"task {task}, the model is a " in capsys.readouterr().err
    found = load(out)
    assert found.header["settings"] == {"loss": task, "labels": "true", "samples": 1}
    assert found.header["data"][0]["examples"] == 11
    config = json.loads((folders[name] / "config.json").read_text())
    assert task_of(config["architectures"], False) == task
    for layer in found.layers:
        assert found.input_gram(layer).isfinite().all()
        if "pooler" not in layer:
            assert float(found.output_grad_gram(layer).abs().max()) > 0, layer


def test_an_architecture_that_tells_no_task_is_an_error(folders, tmp_path, capsys):
    arguments = [
        folders["encoder"],
        folders["texts.txt"],
        "--out",
        tmp_path / "s",
        "--device",
        "cpu",
    ]
    assert run(*arguments) == 1
    assert "is a BertModel, whose loss is not known; pass --task" in capsys.readouterr().err
    assert run(*arguments, "--task", "embedding") == 0
    assert "task embedding, as asked" in capsys.readouterr().err


def test_layers_are_named_as_in_the_files(folders, tmp_path):
    model = transformers.BertForSequenceClassification(cases.bert().config)
    assert (
        stored_name(model, str(folders["classifier"]))("bert.pooler.dense") == "bert.pooler.dense"
    )
    assert stored_name(model, str(folders["encoder"]))("bert.pooler.dense") == "pooler.dense"
    bare = transformers.BertModel(model.config)
    assert stored_name(bare, str(folders["classifier"]))("pooler.dense") == "bert.pooler.dense"
    out = tmp_path / "s.safetensors"
    arguments = [
        "--task",
        "embedding",
        "--out",
        out,
        "--device",
        "cpu",
        "-q",
        "--layers",
        "bert.encoder.*.key",
    ]
    assert run(folders["classifier"], folders["texts.txt"], *arguments) == 0
    assert load(out).layers == tuple(f"bert.encoder.layer.{i}.attention.self.key" for i in range(2))


def test_merge_and_show(folders, tmp_path, capsys):
    halves = []
    for number, texts in enumerate((TEXTS[:5], TEXTS[5:])):
        data = tmp_path / f"{number}.txt"
        data.write_text("\n".join(texts), encoding="utf-8")
        halves.append(tmp_path / f"{number}.safetensors")
        arguments = ["--out", halves[-1], "--kinds", "input_gram", "--device", "cpu", "-q"]
        assert run(folders["causal"], data, *arguments) == 0
    whole = tmp_path / "all.safetensors"
    assert run("merge", whole, *halves) == 0
    assert "11 examples" in capsys.readouterr().out
    assert run("show", whole, "--tensors") == 0
    shown = capsys.readouterr().out
    assert (
        "input_gram/model.layers.0.mlp.up_proj: as input_gram/model.layers.0.mlp.gate_proj" in shown
    )
    assert run("merge", tmp_path / "twice", halves[0], halves[0]) == 1
    error = capsys.readouterr().err
    assert "same data" in error and "pass --allow-repeats to" in error


@pytest.mark.parametrize("name", ["causal", "masked", "classifier"])
def test_parts_of_the_texts_make_the_whole(
    folders, tmp_path, name
):  # S8, S11: with drawn labels too
    whole = tmp_path / "whole"
    assert run(folders[name], folders["texts.txt"], "--out", whole, "--batch-size", 4, "-q") == 0
    parts = []
    for first, end in ((0, 5), (5, 11)):
        data = tmp_path / f"{first}.txt"
        data.write_text("\n".join(TEXTS[first:end]), encoding="utf-8")
        parts.append(tmp_path / f"part{first}")
        options = ("--first-example", first, "--batch-size", 3, "-q")
        assert run(folders[name], data, "--out", parts[-1], *options) == 0
    assert run("merge", tmp_path / "all", *parts) == 0
    one, merged = load(whole), load(tmp_path / "all")
    for layer in one.layers:
        for kind in ("input_gram", "output_grad_gram"):
            x, y = (getattr(held, kind)(layer) for held in (one, merged))
            assert torch.allclose(x, y, rtol=1e-4, atol=1e-5 * float(x.abs().max())), (kind, layer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "none.txt"}, "no data file"),
        ({"model": "encoder", "extra": ["--task", "sequence-classification"]}, "random weights"),
        ({"extra": ["--labels", "empirical"], "data": "texts.txt"}, "line 1 has no label"),
        ({"model": "causal", "extra": ["--layers", "nothing"]}, "nothing to collect"),
    ],
)
def test_errors(folders, tmp_path, capsys, change, message):
    model = folders[change.get("model", "classifier")]
    data = folders.get(change.get("data", "labelled.jsonl"), tmp_path / "none.txt")
    out = tmp_path / "s.safetensors"
    assert run(model, data, "--out", out, "--device", "cpu", *change.get("extra", [])) == 1
    assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("model", "device", "status", "message"),
    [
        ("encoder", "cuda:99", 1, "--device cuda:99 is not there"),
        ("encoder", "gpu", 2, "'gpu'"),
        ("no/such-model-here", "cpu", 1, "model 'no/such-model-here' is neither a folder here nor"),
    ],
)
def test_what_is_not_there_is_named(
    folders, tmp_path, capsys, monkeypatch, model, device, status, message
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    name = folders.get(model, model)
    out = tmp_path / "s.safetensors"
    assert run(name, folders["texts.txt"], "--out", out, "--device", device) == status
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 99), "announces a header"),
        (lambda f: (f / "model.safetensors").unlink(), "cannot be loaded"),
        (
            lambda f: [each.unlink() for each in f.glob("tokenizer*")],
            "no tokenizer that transformers can load",
        ),
    ],
)
def test_damaged_folders(folders, tmp_path, capsys, damage, message):
    folder = shutil.copytree(folders["causal"], tmp_path / "model")
    damage(folder)
    out = tmp_path / "s.safetensors"
    assert run(folder, folders["texts.txt"], "--out", out, "--device", "cpu") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and str(folder) in error
    assert len(error.splitlines()) == 1


def _default_config(folder):
    """Of 6.7 billion parameters, where the files hold a few thousand."""
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


def _wider_config(folder):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 48}))


@pytest.mark.parametrize(
    ("change", "message"),
    [(_default_config, "parameters, and the files hold"), (_wider_config, "by the config")],
)
def test_a_config_of_another_model_is_found_before_anything_is_made(
    folders, tmp_path, capsys, monkeypatch, change, message
):
    folder = shutil.copytree(folders["causal"], tmp_path / "model")
    change(folder)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", None)
    out = tmp_path / "s.safetensors"
    options = ("--out", out, "--device", "cpu", "--task", "causal-lm")
    assert run(folder, folders["texts.txt"], *options) == 1
    error = capsys.readouterr().err
    assert message in error and "download both again" in error and len(error.splitlines()) == 1


def test_weights_that_are_truncated_while_they_are_loaded(folders, tmp_path, capsys, monkeypatch):
    """By the command line, which survives it: transformers maps the files."""
    folder = shutil.copytree(folders["causal"], tmp_path / "model")
    opened = transformers.modeling_utils.safe_open

    def truncated(file, *args, **options):
        found = opened(file, *args, **options)
        os.truncate(file, 0)
        return found

    monkeypatch.setattr("transformers.modeling_utils.safe_open", truncated)
    out = tmp_path / "s.safetensors"
    assert run(folder, folders["texts.txt"], "--out", out, "--device", "cpu") == 1
    error = capsys.readouterr().err
    assert f"{folder}/model.safetensors: was truncated" in error
    assert not out.exists()


def test_weights_that_are_truncated_once_they_are_loaded(folders, tmp_path):
    folder = shutil.copytree(folders["causal"], tmp_path / "model")
    loaded = load_model(str(folder), None, "cpu", "auto")
    os.truncate(folder / "model.safetensors", 0)
    assert all(bool(weight.isfinite().all()) for weight in loaded.model.parameters())


def test_a_statistics_file_is_replaced_only_when_asked(folders, tmp_path, capsys):
    out, texts = tmp_path / "s.safetensors", folders["texts.txt"]
    assert run(folders["causal"], texts, "--out", out, "--device", "cpu", "-q") == 0
    before = out.read_bytes()
    assert run(folders["masked"], texts, "--out", out, "--device", "cpu") == 1
    error = capsys.readouterr().err
    assert f"{out} exists and holds statistics of causal" in error
    assert "pass --overwrite to replace it" in error and "overwrite=" not in error
    other = tmp_path / "other"
    options = ("--kinds", "input_gram", "--device", "cpu", "-q")
    assert run(folders["masked"], texts, "--out", other, *options) == 0
    assert run("merge", out, other) == 1  # of PARTS the first where OUT was forgotten
    assert "OUT" not in capsys.readouterr().out
    assert out.read_bytes() == before
    assert run("merge", out, other, "--overwrite") == 0
    assert load(out).header["model"]["name"] == "masked"
    assert run(folders["causal"], texts, "--out", out, "--overwrite", *options) == 0
    assert load(out).header["model"]["name"] == "causal"


@pytest.mark.parametrize("kind", ["weights", "text", "data", "damaged", "link", "pipe"])
@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_what_is_no_statistics_file_is_never_replaced(folders, tmp_path, capsys, kind, overwrite):
    texts = Path(shutil.copy(folders["texts.txt"], tmp_path / "texts.txt"))
    out = texts if kind == "data" else tmp_path / "file"
    if kind == "weights":
        shutil.copy(folders["causal"] / "model.safetensors", out)
    elif kind == "link":
        out.symlink_to(tmp_path / "nowhere")
    elif kind == "pipe":
        os.mkfifo(out)
    elif kind != "data":
        out.write_bytes(b"{" * 99 if kind == "damaged" else b"my thesis")
    held = None if kind in ("link", "pipe") else out.read_bytes()
    part = tmp_path / "part"
    options = ("--kinds", "input_gram", "--device", "cpu", "-q")
    assert run(folders["causal"], texts, "--out", part, *options) == 0
    for command in ((folders["causal"], texts, "--out", out, *options), ("merge", out, part)):
        assert run(*command, *overwrite) == 1
        assert f"{out} exists and is not a statistics file; it is never" in capsys.readouterr().err
    assert out.is_symlink() if kind == "link" else held is None or out.read_bytes() == held


def test_an_interruption_says_the_whole_command_that_goes_on(
    folders, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "my s.safetensors"
    options = ["--layers", "*.q_proj", "--layers", "*.k_proj", "--kinds", "input_gram"]
    options += ["--checkpoint-every", "1", "--batch-size", "2", "--device", "cpu"]
    monkeypatch.setattr(
        "pymerge.cli.stats._progress",
        lambda *_: contextlib.nullcontext(lambda state, _: state.batches == 2 and _interrupt()),
    )
    assert run(folders["causal"], folders["texts.txt"], "--out", out, *options) == 130
    *_, line = capsys.readouterr().err.strip().splitlines()
    again = shlex.split(line.partition("from the last checkpoint: ")[2])
    monkeypatch.undo()
    assert again[:2] == ["pymerge", "stats"] and not out.exists()
    assert run(*again[2:], "-q") == 0
    assert load(out).header["data"][0]["examples"] == len(TEXTS)
    assert {name.rpartition(".")[2] for name in load(out).layers} == {"q_proj", "k_proj"}


def _interrupt():
    raise KeyboardInterrupt


def test_progress_tells_the_total_and_the_time_left(folders, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("pymerge.cli.terminal.PLAIN_EVERY", 0.0)
    clock = itertools.count(0.0, 20.0)
    monkeypatch.setattr("pymerge.cli.stats.time.monotonic", lambda: next(clock))
    data = [folders["causal"], folders["texts.txt"], "--device", "cpu", "--batch-size", 4]
    assert run(*data, "--out", tmp_path / "s", "--kinds", "input_gram") == 0
    told = capfd.readouterr()
    first, second, last = (line for line in told.err.splitlines() if "examples" in line)
    assert re.fullmatch(r"4 of 11 examples, \d+ tokens", first)
    assert re.fullmatch(r"8 of 11 examples, \d+ tokens, 45 s left", second)
    assert re.fullmatch(r"11 of 11 examples, \d+ tokens", last)
    assert re.search(
        r"s: \d\.\d kB, input_gram\n  of \S+: 15 layers\n  over 11 examples, \d+ t", told.out
    )
    assert "parameters" not in told.out and "labels" not in told.out
    assert run(*data, "--out", tmp_path / "t", "--max-tokens", 8) == 0
    assert re.search(r"\d+ of 8 tokens", capfd.readouterr().err)


def test_errors_name_the_options(folders, tmp_path, capsys):
    out, texts = tmp_path / "s", folders["texts.txt"]
    for options, message in (
        (["--memory-limit", "10"], "--memory-limit 10 bytes does not hold"),
        (["--layers", "nothing"], "fits --kinds input_gram,output_grad_gram, --layers nothing"),
        (["--task", "token-classification", "--labels", "exact"], "pass another --task"),
        (
            ["--labels", "exact"],
            "--labels exact needs one prediction per example; pass --labels true",
        ),
    ):
        assert run(folders["causal"], texts, "--out", out, "--device", "cpu", *options) == 1
        error = capsys.readouterr().err
        assert message in error and not re.search(r"[a-z]=", error), error
    (tmp_path / "s.parts").mkdir()
    (tmp_path / "s.parts/pass-0000.partial.safetensors").touch()
    assert run(folders["causal"], texts, "--out", out, "--device", "cpu") == 1
    assert "pass --resume to go on from it" in capsys.readouterr().err
    (tmp_path / "s.parts/diary.txt").touch()
    assert run(folders["causal"], texts, "--out", out, "--device", "cpu", "--resume") == 1
    assert "it holds diary.txt; move that away, or give another name for --out" in (
        capsys.readouterr().err
    )
    assert (tmp_path / "s.parts/diary.txt").exists()


def test_quiet_prints_nothing(folders, tmp_path, capfd):
    out = tmp_path / "s.safetensors"
    assert run(folders["causal"], folders["texts.txt"], "--out", out, "--device", "cpu", "-q") == 0
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("end", ["</s>", None])
def test_a_decoder_with_a_classification_head_needs_no_padding_token(tmp_path, end):
    config = transformers.GPT2Config(
        vocab_size=29, n_embd=8, n_layer=1, n_head=2, n_positions=32, num_labels=3
    )
    transformers.GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "model")
    plain = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer().backend_tokenizer, eos_token=end and WORDS[-1]
    )
    plain.save_pretrained(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    out = tmp_path / "s.safetensors"
    assert run(tmp_path / "model", tmp_path / "texts.txt", "--out", out, "--device", "cpu") == 0
    assert load(out).counts("transformer.h.0.attn.c_attn").examples == len(TEXTS)


def test_usage_errors(capsys):
    assert run("model", "data") == 2
    assert "--out" in capsys.readouterr().err
    assert run("model", "data", "--out", "x", "--kinds", "gram") == 2
    assert "'gram' is not one of" in capsys.readouterr().err
    assert run("model", "data", "--out", "x", "--memory-limit", "much") == 2
    assert "'much' is not a size" in capsys.readouterr().err
    assert run("--help") == 0
    assert "pymerge stats MODEL DATA" in capsys.readouterr().out


def test_reading_data(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a", "text_pair": "b", "label": "no"}\n\n{"text": "c"}\n')
    assert read_examples(path) == [Example("a", "b", "no"), Example("c")]
    assert label_numbers([Example("a", None, "no")], {"yes": 0, "no": 1}, 2) == [1]
    with pytest.raises(ValueError, match="the model knows 'yes', 'no'"):
        label_numbers([Example("a", None, "maybe")], {"yes": 0, "no": 1}, 2)
    with pytest.raises(ValueError, match="2 classes"):
        label_numbers([Example("a", None, 2)], {}, 2)
    with pytest.raises(
        ValueError, match=r"^line 0 has label <an integer of 13288 bits>; the model"
    ) as caught:
        label_numbers([Example("a", None, 10**4000 - 1)], {}, 2)
    assert len(str(caught.value)) < 200
    path.write_text('\n\n{"text": "a"}\n')
    with pytest.raises(ValueError, match=r"line 3 has no label.* of 0 to 1; or draw"):
        label_numbers(read_examples(path), {}, 2)
    path.write_bytes("\ufeff".encode() + b'{"text": "a"}\n')  # a byte order mark
    assert read_examples(path) == [Example("a")]
    path.write_bytes(b'{"text": "\xe9"}')
    with pytest.raises(ValueError, match=r"d.jsonl is not UTF-8 text \(byte 0xe9\)"):
        read_examples(path)
    for line, message in (
        ("{", "line 1 is not JSON"),
        ('{"t": 1}', 'line 1 has no "text"'),
        ('{"text": "a", "label": 1.5}', '"label" is a float'),
        ('{"text": "a", "text_pair": 1}', '"text_pair" is an int'),
        ('{"text": "\\ud800"}', 'line 1: "text" has half a surrogate pair'),
        ('{"text": "a", "text_pair": "\\udfff"}', '"text_pair" has half'),
        ('{"input": "a", "target": "\\ud83d"}', '"target" has half'),
        ('{"image": "\\ud83d.png"}', '"image" has half'),
        ("", "holds no texts"),
    ):
        path.write_text(line)
        with pytest.raises(ValueError, match=message):
            read_examples(path)
    with pytest.raises(ValueError, match=r"a \.jsonl file"):
        read_examples(tmp_path / "d.csv")


def test_masked_words_do_not_depend_on_batching():
    examples = [Example(text) for text in TEXTS]
    hidden = []
    for size in (1, 4):
        batches = TextBatches(
            tokenizer(), examples, batch_size=size, max_length=16, task="masked-lm"
        )
        assert len(batches) == -(-11 // size)
        rows = [
            row
            for batch in batches
            for row in zip(batch["input_ids"], batch["labels"], strict=True)
        ]
        hidden.append(
            [(int((ids == 4).nonzero()[0]), int(labels[ids == 4][0])) for ids, labels in rows]
        )
        assert all(torch.equal(labels != -100, ids == 4) for ids, labels in rows)
    assert hidden[0] == hidden[1]


@pytest.mark.filterwarnings("ignore:.*moved more than")
@pytest.mark.parametrize("name", ["classifier", "causal"])
def test_files_serve_a_merge_of_the_folders(folders, tmp_path, name):
    """From folders and texts to a merged state dict: every linear layer finds its statistics by its
    tensor's name.
    """
    from safetensors.torch import load_file

    from pymerge.engine.state_dict_statistics import merge_with_statistics

    models, files = [], []
    model = getattr(
        transformers,
        {"classifier": "BertForSequenceClassification", "causal": "LlamaForCausalLM"}[name],
    )
    for number in range(2):
        folder = tmp_path / f"model{number}"
        tuned = model.from_pretrained(folders[name])
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        tuned.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        data = tmp_path / f"{number}.txt"
        data.write_text("\n".join(TEXTS[number::2]), encoding="utf-8")
        files.append(tmp_path / f"{number}.stats.safetensors")
        assert run(folder, data, "--out", files[-1], "--device", "cpu", "-q") == 0
        models.append(load_file(folder / "model.safetensors"))
    linear = {f"{layer}.weight" for layer in load(files[0]).layers}
    assert linear <= models[0].keys()
    _, reports = merge_with_statistics(models, None, files, "mats")
    solved = {report.name for report in reports if report.solver == "cg"}
    assert solved == linear
