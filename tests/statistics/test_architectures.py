"""Tiny models of many architectures: folder, statistics, MaTS merge, the share of the linear
layers that is solved; and what experts and decoders are counted by (S1, S3, S15, S16).
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from architecture_cases import BATCHES, LOSSES, PROCESSOR, images, texts, tiny, tokenizer
from safetensors.torch import load_file

from pymerge import merge_checkpoints
from pymerge.cli.stats import main
from pymerge.rules.mats import is_linear
from pymerge.statistics import Prediction, collect

PAGE = Path(__file__).parents[2] / "docs/statistics.md"
SHARES = dict(re.findall(r"^\| ([^|]+) \| [^|]+ \| (\d+) % \|$", PAGE.read_text(), re.M))


@pytest.mark.parametrize("row", SHARES)
def test_the_share_that_is_solved_is_that_of_the_docs(row, tmp_path, capsys):
    """From two folders and data for each to a merged folder."""
    name, _, kind = row.partition(", ")
    models = []
    for k in range(2):
        folder, out = tmp_path / f"m{k}", tmp_path / f"s{k}"
        tiny(name, k).save_pretrained(folder)
        if name in BATCHES and kind != "texts alone":
            made = type(tiny(name, k)).from_pretrained(folder)
            torch.manual_seed(k)
            batches = [BATCHES[name]() for _ in range(3)]
            collect(made, batches, loss=LOSSES[name], out=out)
        else:
            data = tmp_path / f"d{k}.jsonl"
            if name == "ViT":
                (folder / "preprocessor_config.json").write_text(PROCESSOR)
                data = images(tmp_path / f"d{k}", k)
            else:
                tokenizer().save_pretrained(folder)
                data.write_text(texts(k, targets=name in ("T5", "BART")))
            assert main([str(folder), str(data), "--out", str(out), "--device", "cpu"]) == 0
            assert "task " in capsys.readouterr().err
        models.append({"model": str(folder), "statistics": str(out)})
    recipe = {"merge_method": "mats", "models": models, "parameters": {"allow_unsolved": True}}
    merge_checkpoints(recipe, tmp_path / "out")
    assert round(100 * _share(tmp_path / "out")) == int(SHARES[row])


def _share(folder: Path) -> float:
    rows = json.loads((folder / "merge_report.json").read_text())["layers"]
    solved = {row["name"] for row in rows if row["status"] != "no_statistics"}
    tensors = load_file(folder / "model.safetensors")
    sizes = {n: t.numel() for n, t in tensors.items() if is_linear(n, tuple(t.shape))}
    return sum(sizes[n] for n in sizes if n in solved) / sum(sizes.values())


# Experts.


def _mixtral_sums(model, ids, mask):
    """By hand: every expert's Gram matrices from the tokens that are routed to it."""
    experts = model.model.layers[0].mlp.experts
    held = {}
    hook = experts.register_forward_pre_hook(lambda m, args: held.update(args=args))
    model(input_ids=ids, attention_mask=mask)
    hook.remove()
    hidden, chosen, _ = held["args"]
    kept = mask.reshape(-1) != 0
    sums = []
    for expert in range(4):
        rows = hidden[kept & (chosen == expert).any(1)].double()
        sums.append((rows.T @ rows, len(rows)))
    return sums


def test_experts_have_the_grams_of_their_tokens():
    """S1, S3: rows of padding that are routed too do not count."""
    model = tiny("Mixtral", 0)
    ids = torch.randint(9, 64, (8, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1:4, 8:] = 0
    found = collect(model, [{"input_ids": ids, "attention_mask": mask}], loss="causal-lm")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    total, tokens = 0, 0
    for expert, (gram, count) in enumerate(_mixtral_sums(model, ids, mask)):
        for part in range(2):
            layer = f"{name}.{expert}.{part}"
            assert found.counts(layer, "input_gram").tokens == count
            torch.testing.assert_close(
                found.input_gram(layer, mean=False).double(), gram, rtol=1e-4, atol=1e-5
            )
            assert float(found.output_grad_gram(layer).trace()) > 0
        total, tokens = total + gram, tokens + count
    pooled = found.input_gram(f"{name}.pooled.1", mean=False).double()
    torch.testing.assert_close(pooled, total, rtol=1e-4, atol=1e-5)
    assert found.counts(f"{name}.pooled.0").tokens == tokens == 2 * int(mask.sum())
    assert found.counts("model.layers.0.mlp.gate").tokens == int(mask.sum())
    assert model.config._experts_implementation != "eager"
    assert model.config.use_cache


def test_experts_in_one_parameter_are_merged_as_those_in_files(tmp_path):
    """M16: a folder has a tensor for the gate of each expert, a state dict all in one."""
    import pymerge

    states, held, models = [], [], []
    for k in range(2):
        made = tiny("Mixtral", k)
        made.save_pretrained(tmp_path / f"m{k}")
        torch.manual_seed(k)
        ids = torch.randint(9, 64, (24, 12))
        held.append(collect(made, [{"input_ids": ids}], loss="causal-lm", out=tmp_path / f"s{k}"))
        states.append(made.state_dict())
        models.append({"model": str(tmp_path / f"m{k}"), "statistics": str(tmp_path / f"s{k}")})
    merge_checkpoints({"merge_method": "mats", "models": models}, tmp_path / "out")
    merged = pymerge.merge(states, method="mats", statistics=held)
    loaded = type(made).from_pretrained(tmp_path / "out").state_dict()
    assert merged["model.layers.1.mlp.experts.gate_up_proj"].shape == (4, 96, 32)
    torch.testing.assert_close(merged, loaded, rtol=1e-4, atol=1e-5)


class _Routed(torch.nn.Module):
    """Two experts in one parameter, of which the first sees no row."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = torch.nn.Parameter(torch.randn(2, 3, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.experts[1])


def test_a_product_with_a_slice_is_a_layer():
    x = torch.randn(6, 8)
    model = _Routed()
    found = collect(model, [x], loss=lambda m, b: Prediction(m(b)), labels="exact")
    torch.testing.assert_close(found.input_gram("experts.1", mean=False), x.T @ x)
    p = model(x).softmax(-1)
    outer = (torch.diag_embed(p) - p[:, :, None] * p[:, None]).sum(0)
    torch.testing.assert_close(found.output_grad_gram("experts.1", mean=False), outer.detach())
    assert found.input_gram("experts.0") is None
    torch.testing.assert_close(found.input_gram("experts.pooled", mean=False), x.T @ x)


def test_experts_without_tokens_have_those_of_all(tmp_path):
    """S16."""
    from safetensors.torch import save_file

    models = []
    for k in range(2):
        torch.manual_seed(k)
        model = _Routed()
        collect(
            model,
            [torch.randn(24, 8)],
            loss=lambda m, b: Prediction(m(b)),
            out=tmp_path / f"s{k}",
        )
        tensors = {f"e.{i}.weight": model.experts[i].detach().clone() for i in range(2)}
        save_file(tensors, tmp_path / f"m{k}.safetensors")
        models.append(
            {"model": str(tmp_path / f"m{k}.safetensors"), "statistics": str(tmp_path / f"s{k}")}
        )
    merge_checkpoints({"merge_method": "mats", "models": models}, tmp_path / "out")
    rows = json.loads((tmp_path / "out/merge_report.json").read_text())["layers"]
    notes = {row["name"]: (row["status"] != "no_statistics", row["message"]) for row in rows}
    assert notes["e.1.weight"] == (True, "")
    assert notes["e.0.weight"][0] and "which are all experts'" in notes["e.0.weight"][1]


class _Direct(torch.nn.Module):
    """A router that gives more than its product, and a layer whose weight alone is used."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.steps = _Gate(6, 3), torch.nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores, _ = self.gate(x)
        return (self.steps.weight @ scores.mT).mT.sum(1)


class _Gate(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = super().forward(x)
        return scores, scores.argmax(-1)


def test_weights_that_are_used_directly_have_both_grams():
    """S1: as if their modules were called, under their modules' names."""
    torch.manual_seed(0)
    model, x = _Direct(), torch.randn(4, 5, 6)
    plain = torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.Linear(3, 4, bias=False))
    plain.load_state_dict(
        {"0.weight": model.gate.weight, "0.bias": model.gate.bias, "1.weight": model.steps.weight}
    )
    mask = torch.ones(4, 5)
    mask[1, 2:] = 0
    batch = [{"x": x, "attention_mask": mask}]
    found = collect(model, batch, loss=lambda m, b: Prediction(m(b["x"])))
    wanted = collect(plain, batch, loss=lambda m, b: Prediction(m(b["x"]).sum(1)))
    for own, other in (("gate", "0"), ("steps", "1")):
        for kind in ("input_gram", "output_grad_gram"):
            gram = getattr(found, kind)(own)
            torch.testing.assert_close(gram, getattr(wanted, kind)(other))
            assert float(gram.trace()) > 0


# Sequence to sequence.


def test_decoder_layers_count_the_targets():
    """S3."""
    model = tiny("T5", 0)
    ids = torch.randint(9, 64, (3, 6), generator=torch.Generator().manual_seed(0))
    labels = ids[:, :6].clone()  # as many positions as the inputs
    mask = torch.ones_like(ids)
    mask[0, 2:] = 0
    labels[1, 1:] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    found = collect(model, [batch], loss="seq2seq")
    block = "decoder.block.0.layer"
    for layer, tokens in (
        ("encoder.block.0.layer.0.SelfAttention.q", int(mask.sum())),
        (f"{block}.0.SelfAttention.q", int((labels != -100).sum())),
        (f"{block}.1.EncDecAttention.q", int((labels != -100).sum())),
        (f"{block}.1.EncDecAttention.k", int(mask.sum())),
        ("lm_head", int((labels != -100).sum())),
    ):
        assert found.counts(layer, "input_gram").tokens == tokens, layer


def test_a_prompt_is_not_predicted():
    from pymerge.statistics._text import Example, TextBatches

    examples = [Example("t9 t10 t11", target="t12"), Example("t9", target="t13 t14")]
    (batch,) = TextBatches(tokenizer(), examples, batch_size=2, max_length=16)
    assert batch["input_ids"].tolist() == [[9, 13, 14, 2, 0], [9, 10, 11, 12, 2]]
    assert batch["labels"].tolist() == [[-100, 13, 14, 2, -100], [-100, -100, -100, 12, 2]]
    assert batch["attention_mask"].sum(1).tolist() == [4, 5]
    (batch,) = TextBatches(tokenizer(), examples, batch_size=2, max_length=16, task="seq2seq")
    assert batch["labels"].tolist() == [[13, 14, 2], [12, 2, -100]]
    with pytest.raises(ValueError, match="line 7 has no target"):
        TextBatches(
            tokenizer(), [Example("t9", line=7)], batch_size=1, max_length=9, task="seq2seq"
        )


# How much is solved.


def test_a_merge_that_solves_little_is_an_error(tmp_path):
    import pymerge
    from pymerge.engine.state_dict_statistics import merge_with_statistics

    models = [torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 9)) for _ in range(2)]
    held = [
        collect(m, [torch.randn(8, 4)], loss=lambda m, b: Prediction(m(b)), layers="0")
        for m in models
    ]
    states = [m.state_dict() for m in models]
    with pytest.raises(ValueError, match=r"only 31 % of .*1\.weight.*allow_unsolved=True"):
        pymerge.merge(states, method="mats", statistics=held)
    _, reports = merge_with_statistics(states, None, held, allow_unsolved=True)
    assert {r.name for r in reports if r.status != "no_statistics"} == {"0.weight"}
    parts = []
    for k, (state, statistics) in enumerate(zip(states, held, strict=True)):
        from safetensors.torch import save_file

        save_file(state, tmp_path / f"{k}.safetensors")
        statistics.save(tmp_path / f"{k}.stats")
        parts.append(
            {
                "model": str(tmp_path / f"{k}.safetensors"),
                "statistics": str(tmp_path / f"{k}.stats"),
            }
        )
    recipe = {"merge_method": "mats", "models": parts}
    with pytest.raises(ValueError, match=r"only 31 % .*allow_unsolved: true"):
        merge_checkpoints(recipe, tmp_path / "out")
    merge_checkpoints({**recipe, "parameters": {"allow_unsolved": True}}, tmp_path / "out")
