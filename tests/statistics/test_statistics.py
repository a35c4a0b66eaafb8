"""Statistics against their definitions (docs/spec/statistics.md)."""

from __future__ import annotations

import weakref

import pytest
import statistics_cases as cases
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pymerge.statistics import KINDS, Prediction, Statistics, _memory, collect


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def agree(stats: Statistics, truth: dict[str, torch.Tensor], rtol: float = 1e-6) -> None:
    """Every sum of the definition is there, to fp32 rounding of its largest element."""
    for key, expected in truth.items():
        kind, _, name = key.partition("/")
        found = getattr(stats, kind)(name, mean=False)
        assert found is not None, key
        assert found.dtype == torch.float32
        error = (found.double() - expected).abs().max()
        # A key's bias has no gradient but rounding: softmax does not see it.
        assert error <= rtol * expected.abs().max() + 1e-25, (
            f"{key}: {error} of {expected.abs().max()}"
        )


def classify(model, example):
    return functional.cross_entropy(
        model(**{k: v for k, v in example.items() if k != "labels"}).logits, example["labels"]
    )


def next_tokens(model, example):
    logits = model(input_ids=example["input_ids"], attention_mask=example["attention_mask"]).logits[
        0, :-1
    ]
    return functional.cross_entropy(logits, example["input_ids"][0, 1:], reduction="sum")


def test_bert_by_definition():  # S3 to S6: padding, q/k/v, pooler, embeddings, norms, position embeddings
    model, batches = cases.bert(), cases.token_batches(40, labels=3)
    stats = collect(model, batches, loss="sequence-classification", kinds=KINDS, labels="empirical")
    truth = cases.defined(model, cases.single_examples(batches), classify, is_linear)
    assert len(truth) == 93
    agree(stats, truth)
    attention = "bert.encoder.layer.0.attention.self."
    assert (
        stats.shares_input(f"{attention}key")
        == stats.shares_input(f"{attention}value")
        == f"{attention}query"
    )
    assert f"input_gram/{attention}key" not in stats.header["tensors"]
    tokens = int(sum(batch["attention_mask"].sum() for batch in batches))
    assert stats.counts(f"{attention}key").tokens == tokens
    assert stats.counts("classifier").tokens == stats.counts("classifier").examples == 5
    gram = stats.input_gram(f"{attention}key")
    torch.testing.assert_close(gram * tokens, stats.input_gram(f"{attention}query", mean=False))


def test_gpt2_by_definition():  # Conv1D; a head tied to the token embedding
    model, batches = cases.gpt2(), cases.token_batches(30)
    stats = collect(model, batches, loss="causal-lm", kinds=KINDS, labels="empirical")
    truth = cases.defined(model, cases.single_examples(batches), next_tokens, is_linear)
    agree(stats, truth)
    assert stats.header["layers"]["transformer.h.0.attn.c_attn"]["transposed"]
    assert stats.diagonal_fisher("transformer.h.0.attn.c_attn.weight").shape == (8, 24)
    torch.testing.assert_close(
        stats.diagonal_fisher("lm_head.weight"), stats.diagonal_fisher("transformer.wte.weight")
    )
    assert "diagonal_fisher/lm_head.weight" not in stats.header["tensors"]


def test_llama_by_definition():  # a norm without a formula of its own; gate and up share their input
    model, batches = cases.llama(), cases.token_batches(30)
    stats = collect(model, batches, loss="causal-lm", kinds=KINDS, labels="empirical")
    agree(stats, cases.defined(model, cases.single_examples(batches), next_tokens, is_linear))
    assert stats.shares_input("model.layers.0.mlp.up_proj") == "model.layers.0.mlp.gate_proj"


class Odd(nn.Module):
    """A vector used outside of any module's forward, a layer called twice, tied layers, an unused
    layer, a weight used directly.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(6))
        self.twice = nn.Linear(6, 6)
        self.first, self.second = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight
        self.direct = nn.Linear(6, 6)
        self.unused = nn.Linear(6, 2)
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.twice(x * self.scale))
        h = torch.tanh(self.twice(h)) + self.second(torch.tanh(self.first(h)))
        h = h + functional.linear(self.direct(h), self.direct.weight)
        return self.head(h).mean(1)


def odd_case():
    torch.manual_seed(3)
    model = Odd().double()
    batches = [(torch.randn(n, 5, 6).double(), torch.randint(4, (n,))) for n in (4, 3)]
    examples = [(x[i : i + 1], y[i : i + 1]) for x, y in batches for i in range(len(x))]
    truth = cases.defined(
        model, examples, lambda m, e: functional.cross_entropy(m(e[0]), e[1]), is_linear
    )
    return model, batches, truth


def odd_loss(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def test_shared_and_direct_uses():  # S2: tied layers count once; S5: what no formula knows is found out
    model, batches, truth = odd_case()
    stats = collect(model, batches, loss=odd_loss, kinds=KINDS, labels="empirical")
    for kind in ("input_gram", "output_grad_gram"):
        truth[f"{kind}/first"] = truth[f"{kind}/first"] + truth.pop(f"{kind}/second")
    agree(stats, truth)
    torch.testing.assert_close(stats.input_gram("second"), stats.input_gram("first"))
    assert stats.counts("first").tokens == stats.counts("twice").tokens == 2 * 35
    assert stats.input_gram("unused") is None  # S12
    assert stats.output_grad_gram("unused") is None
    assert float(stats.diagonal_fisher("unused.weight").abs().max()) == 0


@pytest.mark.parametrize("limit", [8 * 36, 8 * 80, 8 * 200])
def test_streamed_groups_give_the_same_bits(limit, tmp_path):  # S9
    model, batches, _ = odd_case()
    options = {"loss": odd_loss, "kinds": KINDS, "labels": "empirical"}
    whole = collect(model, batches, **options)
    passes = []
    split = collect(
        model, batches, memory_limit=limit, progress=lambda p: passes.append(p.passes), **options
    )
    filed = collect(model, batches, memory_limit=limit, out=tmp_path / "s.safetensors", **options)
    assert max(passes) > 1
    assert (
        sorted(split.header["tensors"])
        == sorted(whole.header["tensors"])
        == sorted(filed.header["tensors"])
    )
    for key in whole.header["tensors"]:
        assert torch.equal(split._read(key), whole._read(key)), key
        assert torch.equal(filed._read(key), whole._read(key)), key
        assert (
            whole.header["tensors"][key]
            == split.header["tensors"][key]
            == filed.header["tensors"][key]
        )
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]


def test_model_comes_back_as_it_was():
    model, batches, _ = odd_case()
    model.train()
    model.head.weight.requires_grad_(False)
    model.scale.grad = torch.ones(6).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    collect(model, batches, loss=odd_loss, kinds=KINDS, labels="empirical")
    assert model.training
    assert model.head.training
    assert not model.head.weight.requires_grad
    assert model.twice.weight.requires_grad
    assert model.twice.weight.grad is None
    assert torch.equal(model.scale.grad, torch.ones(6).double())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.LayerNorm(9), nn.Linear(9, 6))
            for _ in range(3)
        )
        self.head = nn.Linear(6, 4)
        self.reentrant = reentrant

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.embed(ids)
        for layer in self.layers:
            h = h + (
                layer(h)
                if self.reentrant is None
                else checkpoint(layer, h, use_reentrant=self.reentrant)
            )
        return self.head(h.mean(1))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("samples", [1, 2])
def test_checkpointed_activations_count_once(reentrant, samples):  # S9
    torch.manual_seed(0)
    plain = Checkpointed(None).double()
    other = Checkpointed(reentrant).double()
    other.load_state_dict(plain.state_dict())
    batches = [torch.randint(11, (4, 5)) for _ in range(2)]
    options = {"loss": lambda m, b: Prediction(m(b)), "kinds": KINDS, "samples": samples}
    one, two = collect(plain, batches, **options), collect(other, batches, **options)
    assert list(one.header["tensors"].values()) == list(two.header["tensors"].values())
    for key in one.header["tensors"]:
        assert torch.equal(one._read(key), two._read(key)), key
        assert float(one._read(key).abs().max()) > 0


def test_reentrant_checkpointing_that_stops_gradients_is_an_error():
    class Blocked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(checkpoint(self.inner, x, use_reentrant=True))

    with (
        pytest.warns(UserWarning, match="requires_grad"),
        pytest.raises(RuntimeError, match="use_reentrant=False"),
    ):
        collect(Blocked(), [torch.randn(3, 4)], loss=lambda m, b: Prediction(m(b)))


def linear_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4))


def test_exact_labels_are_the_true_fisher():  # S7
    model = linear_model().double()
    batches = [torch.randn(n, 5).double() for n in (3, 6)]
    stats = collect(model, batches, loss=lambda m, b: Prediction(m(b)), kinds=KINDS, labels="exact")
    total: dict[str, torch.Tensor] = {}
    for x in torch.cat(batches):
        p = model(x[None]).softmax(-1)[0].detach()
        for label in range(4):
            part = cases.defined(
                model, [x[None]], lambda m, e, y=label: -m(e).log_softmax(-1)[0, y], is_linear
            )
            for key, value in part.items():
                weight = 1 if key.startswith("input_gram") and label == 0 else p[label]
                weight = 0 if key.startswith("input_gram") and label else weight
                total[key] = total.get(key, 0) + weight * value
    agree(stats, total)
    assert stats.counts("0").draws == 9


def test_drawn_labels_approach_the_true_fisher():  # S8: the error shrinks as 1 / sqrt(draws)
    model, batch = linear_model(), torch.randn(8, 5)
    loss = lambda m, b: Prediction(m(b))  # noqa: E731
    options = {"loss": loss, "kinds": ("output_grad_gram",)}
    exact = collect(model, [batch], labels="exact", **options).output_grad_gram("2")
    drawn = collect(model, [batch.repeat(1000, 1)], samples=2, **options)
    assert drawn.counts("2").draws == 16000
    error = (drawn.output_grad_gram("2") - exact).norm() / exact.norm()
    assert error < 0.03
    few = collect(model, [batch], samples=2, seed=5, **options).output_grad_gram("2")
    assert (few - exact).norm() / exact.norm() > error


def test_two_draws_are_held_at_a_time(monkeypatch):  # each has a graph as large as the logits
    from pymerge.statistics import _passes

    alive: list[weakref.ref] = []
    most = 0

    def counted(*given, draws=_passes.per_example_losses):
        nonlocal most
        for losses in draws(*given):
            alive.append(weakref.ref(losses))
            most = max(most, sum(each() is not None for each in alive))
            yield losses
            del losses

    monkeypatch.setattr(_passes, "per_example_losses", counted)
    collect(
        linear_model(),
        [torch.randn(2, 5)],
        loss=lambda model, x: Prediction(model(x)),
        kinds=("output_grad_gram",),
        samples=40,
    )
    assert len(alive) >= 40 and most <= 3


def test_drawn_labels_do_not_depend_on_batching_or_padding():  # S8
    model, batches = cases.gpt2(), cases.token_batches(30, sizes=(3, 2))
    options = {"loss": "causal-lm", "kinds": KINDS, "seed": 7}
    whole = collect(model, batches, **options)
    single = collect(model, cases.single_examples(batches), **options)
    for key in whole.header["tensors"]:
        torch.testing.assert_close(single._read(key), whole._read(key), rtol=1e-5, atol=1e-9)
    other = collect(model, batches, **{**options, "seed": 8})
    key = "output_grad_gram/transformer.h.0.attn.c_attn"
    assert not torch.allclose(other._read(key), whole._read(key), rtol=1e-2)


def test_gaussian_loss():  # S7
    model = linear_model().double()
    batches = [torch.randn(4, 5).double()]
    loss = lambda m, b: Prediction(m(b), gaussian=True)  # noqa: E731
    exact = collect(
        model, batches, loss=loss, labels="exact", kinds=("output_grad_gram", "diagonal_fisher")
    )
    torch.testing.assert_close(exact.output_grad_gram("2"), torch.eye(4))
    many = [batches[0].repeat(4000, 1)]
    drawn = collect(model, many, loss=loss, kinds=("output_grad_gram", "diagonal_fisher"))
    torch.testing.assert_close(drawn.output_grad_gram("2"), torch.eye(4), rtol=0.06, atol=0.06)
    torch.testing.assert_close(
        drawn.diagonal_fisher("0.weight"), exact.diagonal_fisher("0.weight"), rtol=0.2, atol=0.02
    )


def test_autocast_sums_what_the_layer_saw_in_fp32():  # S9
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 8))
    batches = [torch.randn(64, 32) for _ in range(40)]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        inputs = [model[0](x) for x in batches]
    assert inputs[0].dtype == torch.bfloat16
    stats = collect(model, batches, kinds=("input_gram",), autocast=torch.bfloat16)
    rows = torch.cat(inputs).double()
    truth = rows.T @ rows
    assert (
        stats.input_gram("1", mean=False).double() - truth
    ).abs().max() <= 1e-6 * truth.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        outer = collect(model, batches, loss=lambda m, b: Prediction(m(b)), kinds=KINDS)
    assert torch.equal(outer.input_gram("1"), stats.input_gram("1"))
    eigenvalues = torch.linalg.eigvalsh(outer.output_grad_gram("0").double())
    assert eigenvalues[0] >= -1e-6 * eigenvalues[-1]


def test_running_sum_does_not_lose_small_chunks():  # S9: an fp32 running sum would stay at 2**24
    batches = [torch.full((1, 1), 4096.0)] + [torch.ones(1, 1)] * 100
    stats = collect(nn.Linear(1, 1, bias=False), batches, kinds=("input_gram",))
    assert float(stats.input_gram("", mean=False)) == 2**24 + 100
    assert stats.counts("").tokens == 101


def test_loss_scale_is_taken_out_again():
    model, batches, truth = odd_case()
    stats = collect(
        model, batches, loss=odd_loss, kinds=KINDS, labels="empirical", loss_scale=1024.0
    )
    agree(
        stats,
        {key: value for key, value in truth.items() if "first" not in key and "second" not in key},
    )


def test_masked_positions_count_in_no_gram_matrix():  # S3, S4, though the loss of this model sees them
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    x, mask = torch.randn(2, 5, 4), torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]])
    stats = collect(
        model,
        [{"x": x, "mask": mask}],
        loss=lambda m, b: Prediction(m(b["x"]).sum(1)),
        labels="exact",
        kinds=KINDS,
        mask="mask",
    )
    kept = x[mask.bool()]
    torch.testing.assert_close(stats.input_gram("", mean=False), kept.T @ kept)
    gradients = collect(
        model,
        [{"x": x, "mask": torch.ones(2, 5)}],
        loss=lambda m, b: Prediction(m(b["x"]).sum(1)),
        labels="exact",
        kinds=KINDS,
        mask="mask",
    )
    p = model(x).sum(1).softmax(-1).detach()
    each = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    counts = mask.sum(1)[:, None, None]
    torch.testing.assert_close(stats.output_grad_gram("", mean=False), (each * counts).sum(0))
    torch.testing.assert_close(gradients.output_grad_gram("", mean=False), (each * 5).sum(0))
    assert torch.equal(stats.diagonal_fisher("weight"), gradients.diagonal_fisher("weight"))  # S5


def test_an_input_changed_in_place_is_another_input():  # S3
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.after = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = x * 2
            return self.before(h) + self.after(h.add_(1))

    x = torch.randn(4, 3)
    stats = collect(InPlace(), [x], kinds=("input_gram",))
    assert stats.shares_input("after") == "after"
    torch.testing.assert_close(stats.input_gram("before", mean=False), (2 * x).T @ (2 * x))
    torch.testing.assert_close(stats.input_gram("after", mean=False), (2 * x + 1).T @ (2 * x + 1))


def test_rank_deficient_and_dead_inputs():  # S12: nothing is added to make a matrix definite
    model = nn.Linear(6, 3)
    x = torch.randn(2, 6)
    x[:, 4] = 0
    stats = collect(
        model, [x], loss=lambda m, b: Prediction(m(b)), kinds=KINDS, layers=lambda name: True
    )
    gram = stats.input_gram("")
    assert float(gram[4].abs().max()) == float(gram[:, 4].abs().max()) == 0
    assert int(torch.linalg.matrix_rank(gram.double(), rtol=1e-6)) == 2
    assert float(stats.diagonal_fisher("weight")[:, 4].abs().max()) == 0


def test_no_tokens_give_none():  # S12
    model = cases.bert()
    batch = cases.token_batches(40, labels=3)[0]
    batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
    stats = collect(model, [batch], kinds=("input_gram",), loss=None, layers="*.intermediate.dense")
    layer = "bert.encoder.layer.0.intermediate.dense"
    assert stats.layers == (layer, layer.replace(".0.", ".1."))
    assert stats.counts(layer).tokens == stats.counts(layer).examples == 0
    assert stats.input_gram(layer) is None


def test_wholly_masked_examples_do_not_count():
    model, batches = cases.bert(), cases.token_batches(40, labels=3)
    options = {
        "loss": "sequence-classification",
        "kinds": ("output_grad_gram",),
        "layers": "*.layer.*",
    }
    few = collect(model, batches, labels="empirical", **options)
    padded = [dict(batch) for batch in batches]
    for batch in padded:
        batch["input_ids"] = torch.cat(
            [batch["input_ids"], torch.zeros_like(batch["input_ids"][:1])]
        )
        batch["attention_mask"] = torch.cat(
            [batch["attention_mask"], torch.zeros_like(batch["attention_mask"][:1])]
        )
        batch["labels"] = torch.cat([batch["labels"], torch.zeros(1, dtype=torch.long)])
    more = collect(model, padded, labels="empirical", **options)
    layer = few.layers[0]
    assert more.counts(layer) == few.counts(layer)


def test_layer_and_parameter_filters():
    model, batches = cases.bert(), cases.token_batches(40, labels=3)
    options = {"loss": "sequence-classification", "labels": "empirical"}
    stats = collect(
        model, batches, layers=["*.attention.self.*"], kinds=KINDS, parameters="*.bias", **options
    )
    assert len(stats.layers) == 6
    assert all("attention.self" in name and name.endswith("bias") for name in stats.parameters)
    assert len(stats.parameters) == 6
    by_function = collect(model, batches, layers=lambda name: name.endswith("key"), **options)
    assert [name.rpartition(".")[2] for name in by_function.layers] == ["key", "key"]


@pytest.mark.parametrize(("memory", "passes"), [(10**9, 1), (1200, 2), (0, 4)])
def test_without_a_limit_the_sums_take_half_of_the_memory_beside_the_model(
    monkeypatch, memory, passes
):  # S9
    model, batches = linear_model(), [torch.randn(3, 5)]
    held = sum(4 * p.numel() for p in model.parameters())
    monkeypatch.setattr(_memory, "device_memory", lambda device: held + memory)
    seen = []
    options = {"loss": lambda m, b: Prediction(m(b)), "progress": lambda p: seen.append(p.passes)}
    stats = collect(model, batches, **options)
    assert set(seen) == {passes}
    whole = collect(model, batches, memory_limit=10**9, loss=options["loss"])
    for layer in whole.layers:
        assert torch.equal(stats.input_gram(layer), whole.input_gram(layer))


def test_the_memory_of_a_container_counts(tmp_path):
    machine = _memory.device_memory(torch.device("cpu"))
    assert machine > 10**8
    limits = [tmp_path / "memory.max", tmp_path / "absent"]
    for text, want in (("max\n", None), ("50000000\n", 50_000_000)):
        limits[0].write_text(text)
        got = _memory.device_memory(torch.device("cpu"), limits)
        assert got == want if want else got >= machine


def test_max_dim_leaves_large_factors_out_and_says_so():
    model, batches = cases.gpt2(), cases.token_batches(30)
    stats = collect(model, batches, loss="causal-lm", max_dim=26)
    assert stats.output_grad_gram("lm_head") is None
    assert stats.input_gram("lm_head") is not None
    assert "max_dim=26" in stats.header["skipped"]["output_grad_gram/lm_head"]


def test_max_tokens_stops_after_the_batch():
    model, batches = cases.gpt2(), cases.token_batches(30, sizes=(2, 2, 2))
    first = int(batches[0]["attention_mask"].sum())
    stats = collect(model, batches, kinds=("input_gram",), max_tokens=first + 1)
    assert stats.header["data"][0]["batches"] == 2


def test_mask_function_and_no_mask():
    model, batches = cases.bert(), cases.token_batches(40)
    layer = "bert.encoder.layer.0.intermediate.dense"
    options = {"kinds": ("input_gram",), "layers": layer}
    every = collect(model, batches, mask=None, **options)
    assert every.counts(layer).tokens == 35
    first = collect(
        model,
        batches,
        mask=lambda b, name: torch.arange(7).expand(b["input_ids"].shape) < 1,
        **options,
    )
    assert first.counts(layer).tokens == 5
    with pytest.raises(ValueError, match=r"line up with the mask \(3, 2\) that mask="):
        collect(model, batches, mask=lambda b, name: torch.ones(len(b["input_ids"]), 2), **options)


def test_one_shot_iterators():
    batches = [torch.randn(3, 5) for _ in range(3)]
    options = {"loss": lambda m, b: Prediction(m(b)), "kinds": ("input_gram",)}
    once = collect(linear_model(), iter(batches), **options)
    assert torch.equal(
        once.input_gram("0"), collect(linear_model(), batches, **options).input_gram("0")
    )
    assert torch.equal(
        once.input_gram("0"),
        collect(linear_model(), lambda: iter(batches), **options).input_gram("0"),
    )
    with pytest.raises(ValueError, match="read once"):
        collect(linear_model(), iter(batches), memory_limit=8 * 49, **options)
    with pytest.raises(ValueError, match="batches is empty"):
        collect(linear_model(), [], **options)


def test_batches_that_change_between_passes_are_refused():
    calls = []

    def shuffled():
        calls.append(0)
        return iter([torch.full((2, 5), float(len(calls)))])

    with pytest.raises(ValueError, match="batches differ"):
        collect(linear_model(), shuffled, kinds=("input_gram",), memory_limit=8 * 49)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_formulas_serve_whole_transformers(monkeypatch, family):  # S5: no backward pass per example
    model = getattr(cases, family)().float()
    loss = "sequence-classification" if family == "bert" else "causal-lm"
    passes = []
    backward = torch.Tensor.backward
    monkeypatch.setattr(
        torch.Tensor, "backward", lambda *args, **kw: (passes.append(0), backward(*args, **kw))
    )
    collect(model, cases.token_batches(30, sizes=(6, 6)), loss=loss, kinds=KINDS)
    assert len(passes) == 3  # one to check the formulas, one a batch


def test_a_loop_stands_in_where_formulas_do_not_serve(monkeypatch):
    model, batches, _ = odd_case()
    passes = []
    backward = torch.Tensor.backward
    monkeypatch.setattr(
        torch.Tensor, "backward", lambda *args, **kw: (passes.append(0), backward(*args, **kw))
    )
    collect(model, batches, loss=odd_loss, kinds=KINDS, labels="empirical")
    assert len(passes) == 1 + 2 + 7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_statistics():  # S8, S9: the same draws, fp32 products even where TF32 is on
    model, batches = cases.llama().float(), cases.token_batches(30)
    options = {"loss": "causal-lm", "kinds": KINDS}
    here = collect(model, batches, **options)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        there = collect(model.cuda(), batches, **options)
    finally:
        torch.set_float32_matmul_precision(before)
    assert there.header["tensors"] == here.header["tensors"]
    for key in here.header["tensors"]:
        a, b = there._read(key), here._read(key)
        assert (a - b).norm() <= 1e-2 * b.norm(), key


@pytest.mark.parametrize("labels", ["true", "empirical"])
def test_a_batch_without_a_prediction_adds_nothing_to_gradients(labels):
    """Texts of one token, of which no next one is to be predicted."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 5), nn.Linear(5, 7))

    def loss(model, batch):
        return Prediction(model(batch)[:, :-1], batch[:, 1:])

    texts, words = torch.randint(7, (3, 4)), torch.randint(7, (2, 1))
    alone, both = (
        collect(model, batches, loss=loss, labels=labels, layers=["1"])
        for batches in ([texts], [texts, words])
    )
    got, wanted = (each.output_grad_gram("1", mean=False) for each in (both, alone))
    assert wanted.norm() > 0
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    assert both.input_gram("1", mean=False).trace() > alone.input_gram("1", mean=False).trace()
