"""(IA)^3 adapters: statistics by the command, their vectors merged, an adapter that peft loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from architecture_cases import texts, tiny, tokenizer
from click.testing import CliRunner
from safetensors.torch import load_file

import pymerge
from pymerge import merge_checkpoints, plan_checkpoints
from pymerge.cli.main import commands
from pymerge.cli.stats import collect_texts, main
from pymerge.errors import MergeError
from pymerge.statistics import load

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

WO = "base_model.model.encoder.block.0.layer.1.DenseReluDense.wo.ia3_l"
K = "base_model.model.decoder.block.1.layer.1.EncDecAttention.k.ia3_l"


def _base(folder: Path):
    return transformers.AutoModelForSeq2SeqLM.from_pretrained(folder / "base")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, two adapters, their texts and statistics."""
    folder = tmp_path_factory.mktemp("ia3")
    tiny("T5", 0).save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    config = {"task_type": "SEQ_2_SEQ_LM", "target_modules": ["k", "wo"]}
    for k in range(2):
        torch.manual_seed(k)
        model = peft.get_peft_model(
            _base(folder), peft.IA3Config(**config, feedforward_modules=["wo"])
        )
        for name, parameter in model.named_parameters():
            if "ia3_l" in name:
                torch.nn.init.normal_(parameter, 1, 0.3)
        model.save_pretrained(folder / f"a{k}")
        (folder / f"d{k}.jsonl").write_text(texts(k, targets=True))
        data = [str(folder / f"a{k}"), str(folder / f"d{k}.jsonl")]
        assert main([*data, "--out", str(folder / f"s{k}"), "--device", "cpu", "--quiet"]) == 0
    return folder


def _models(folder, **more):
    return [
        {"model": str(folder / f"a{k}"), "statistics": str(folder / f"s{k}"), **more}
        for k in range(2)
    ]


def test_three_commands_make_an_adapter(folder, tmp_path):
    recipe = tmp_path / "mats.yml"
    recipe.write_text(json.dumps({"merge_method": "mats", "models": _models(folder)}))
    out = tmp_path / "out"
    made = CliRunner().invoke(commands, ["merge", str(recipe), str(out), "--verify"])
    assert made.exit_code == 0
    assert "the 10 tensors of the (IA)^3 adapter can be read" in made.output
    assert "config.json" not in made.output
    merged = load_file(out / "adapter_model.safetensors")
    held = [load(folder / f"s{k}") for k in range(2)]
    for name, shape in ((WO, (1, 48)), (K, (32, 1))):
        given = [load_file(folder / f"a{k}/adapter_model.safetensors")[name] for k in range(2)]
        fishers = [each.block_fisher(name) for each in held]
        wanted, _ = pymerge.mats([each.reshape(-1) for each in given], fishers)
        assert merged[name].shape == shape
        torch.testing.assert_close(merged[name].reshape(-1), wanted, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(merged[name], sum(given) / 2, atol=1e-3)
    loaded = peft.PeftModel.from_pretrained(_base(folder), out)
    state = dict(loaded.named_parameters())
    assert torch.equal(state[f"{WO}.default"], merged[WO])


def test_the_block_fisher_is_that_of_the_gradients(folder, tmp_path):
    """S6, of every example by itself."""
    data = tmp_path / "one.jsonl"
    lines = (folder / "d0.jsonl").read_text().splitlines()[:3]
    data.write_text("\n".join(lines))
    found = collect_texts(
        str(folder / "a0"), data, out=tmp_path / "s", labels="empirical", device="cpu"
    )
    assert set(found.parameters) == set(load_file(folder / "a0/adapter_model.safetensors"))
    model = peft.PeftModel.from_pretrained(_base(folder), folder / "a0", is_trainable=True).eval()
    speak = tokenizer()
    total = torch.zeros(48, 48)
    for line in map(json.loads, lines):
        ids = speak(line["input"], return_tensors="pt")["input_ids"]
        labels = speak(line["target"], return_tensors="pt")["input_ids"]
        labels = torch.cat([labels, torch.tensor([[speak.eos_token_id]])], 1)
        model.zero_grad()
        (model(input_ids=ids, labels=labels).loss * labels.numel()).backward()
        v = dict(model.named_parameters())[f"{WO}.default"].grad.reshape(-1)
        total += torch.outer(v, v)
    torch.testing.assert_close(found.block_fisher(WO, mean=False), total, rtol=1e-3, atol=1e-8)


def test_elementwise_methods_take_vectors_too(folder, tmp_path):
    recipe = {"merge_method": "linear", "models": _models(folder, parameters={"weight": 0.5})}
    for each in recipe["models"]:
        del each["statistics"]
    merge_checkpoints(recipe, tmp_path / "out")
    merged = load_file(tmp_path / "out/adapter_model.safetensors")
    given = [load_file(folder / f"a{k}/adapter_model.safetensors")[K] for k in range(2)]
    torch.testing.assert_close(merged[K], sum(given) / 2)
    copied = (tmp_path / "out/adapter_config.json").read_bytes()
    assert copied == (folder / "a0/adapter_config.json").read_bytes()
    assert "library_name: peft" in (tmp_path / "out/README.md").read_text()


def test_vectors_and_models_are_not_merged_with_each_other(folder):
    plain = {"model": str(folder / "base")}
    recipe = {"merge_method": "linear", "parameters": {"weight": 1}, "normalize": True}
    for models in ([plain, {"model": str(folder / "a0")}], [{"model": str(folder / "a0")}, plain]):
        with pytest.raises(
            MergeError, match=r"a0\) are merged with those of others alone, and .*base"
        ):
            plan_checkpoints({**recipe, "models": models})
    with pytest.raises(MergeError, match="name these folders by themselves, without a base"):
        plan_checkpoints({**recipe, "models": [{"model": f"{folder / 'base'}+{folder / 'a0'}"}]})


def test_an_adapter_without_a_base_has_no_statistics(folder, tmp_path, capsys):
    place = tmp_path / "a"
    place.mkdir()
    for path in (folder / "a0").iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    config = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": None})
    )
    data = str(folder / "d0.jsonl")
    assert main([str(place), data, "--out", str(tmp_path / "s"), "--device", "cpu"]) == 1
    assert "its config names no base" in capsys.readouterr().err
