"""`merge_with_statistics`: whole state dicts, streamed, against the ops one by one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mats_cases import case, relative

from pymerge.engine.state_dict_statistics import merge_with_statistics, stream_with_statistics
from pymerge.ops.mats.api import mats
from pymerge.ops.mats.regmean import regmean
from pymerge.ops.mats.report import as_json, as_table, warnings_of, write_reports
from pymerge.ops.mats.weighted_average import weighted_average
from pymerge.rules.report import MatsReport


class Held:
    """Statistics of one model in memory."""

    def __init__(self, **tables: dict[str, torch.Tensor]) -> None:
        self.tables = tables
        self.header = {"layers": {"conv": {"transposed": True}}}

    def __getattr__(self, kind: str):
        if kind.startswith("__") or kind not in (
            "input_gram",
            "output_grad_gram",
            "block_fisher",
            "diagonal_fisher",
        ):
            raise AttributeError(kind)
        return self.tables.get(kind, {}).get

    def shares_input(self, layer: str) -> str:
        return "q" if layer == "k" else layer


@pytest.fixture
def family():
    """Three models with q and k (one input), a Conv1D, an (IA)^3 vector, a norm without statistics,
    a counter.
    """
    layers = {
        name: case(3, *shape, seed=i, dtype=torch.float32)
        for i, (name, shape) in enumerate(
            {"q": (6, 5), "k": (6, 5), "conv": (4, 7), "ia3": (1, 5)}.items()
        )
    }
    layers["k"].a = layers["q"].a
    models, readers = [], []
    for m in range(3):
        models.append(
            {
                "q.weight": layers["q"].weights[m],
                "k.weight": layers["k"].weights[m],
                "conv.weight": layers["conv"].weights[m].T.contiguous(),
                "ia3": layers["ia3"].weights[m][0],
                "norm.weight": torch.full((5,), float(m)),
                "count": torch.tensor(7),
            }
        )
        readers.append(
            Held(
                input_gram={name: layers[name].a[m] for name in ("q", "k", "conv")},
                output_grad_gram={name: layers[name].b[m] for name in ("q", "k", "conv")},
                block_fisher={"ia3": layers["ia3"].a[m]},
                diagonal_fisher={"q.weight": layers["q"].weights[m].abs()},
            )
        )
    base = {name: t.clone() for name, t in models[0].items()}
    return layers, models, base, readers


@pytest.mark.parametrize("window", [1, 1 << 30])
def test_mats_of_every_layer(family, window: int) -> None:
    layers, models, base, readers = family
    merged, reports = merge_with_statistics(models, base, readers, window=window, iterations=4)
    assert list(merged) == list(base)
    for name in ("q", "k", "conv"):
        c = layers[name]
        want = mats(c.weights, c.a, c.b, iterations=4).weight
        got = merged[f"{name}.weight"]
        assert relative(got.T if name == "conv" else got, want) < 1e-6
        assert got.is_contiguous()
    vectors = [w[0] for w in layers["ia3"].weights]
    assert relative(merged["ia3"], mats(vectors, layers["ia3"].a, iterations=4).weight) < 1e-6
    assert torch.equal(merged["norm.weight"], torch.full((5,), 1.0))
    assert int(merged["count"]) == 7
    statuses = {r.name: r.status for r in reports}
    assert statuses["norm.weight"] == "no_statistics"
    assert set(statuses) == set(base) - {"count"}


def test_regmean_and_fisher(family) -> None:
    layers, models, base, readers = family
    merged, _ = merge_with_statistics(models, base, readers, "regmean", off_diagonal=0.9)
    c = layers["q"]
    assert torch.equal(merged["q.weight"], regmean(c.weights, c.a, off_diagonal=0.9).weight)
    merged, reports = merge_with_statistics(models, None, readers, "fisher", minimum=1e-8)
    fishers = [w.abs() for w in c.weights]
    assert torch.equal(merged["q.weight"], weighted_average(c.weights, fishers, minimum=1e-8))
    assert relative(merged["k.weight"], sum(layers["k"].weights) / 3) < 1e-6
    assert {r.name: r.status for r in reports}["k.weight"] == "no_statistics"


def test_output_grams_may_be_left_out(family) -> None:
    layers, models, base, readers = family
    c = layers["q"]
    merged, _ = merge_with_statistics(models, base, readers, output_grams=False)
    assert relative(merged["q.weight"], mats(c.weights, c.a).weight) < 1e-6
    for reader in readers:
        del reader.tables["output_grad_gram"]
    with pytest.raises(ValueError, match="output_grams is true and no statistics"):
        merge_with_statistics(models, base, readers, output_grams=True)


def test_initialisation_may_be_a_whole_model(family) -> None:
    layers, models, base, readers = family
    start = {name: t + 100 if t.is_floating_point() else t for name, t in base.items()}
    with pytest.warns(UserWarning, match="moved more than 20 times"):
        merged, _ = merge_with_statistics(models, base, readers, init=start, iterations=2)
    assert torch.equal(merged["norm.weight"], start["norm.weight"])
    c = layers["conv"]
    want = mats(c.weights, c.a, c.b, init=start["conv.weight"].T, iterations=2).weight
    assert relative(merged["conv.weight"].T, want) < 1e-6


def test_a_model_without_tokens_in_a_layer_counts_as_zero(family) -> None:
    layers, models, base, readers = family
    del readers[1].tables["input_gram"]["conv"], readers[1].tables["output_grad_gram"]["conv"]
    merged, reports = merge_with_statistics(models, base, readers)
    report = next(r for r in reports if r.name == "conv.weight")
    assert "no input_gram in the statistics of models[1]" in report.message
    assert report.trace_shares[1] == 0
    c = layers["conv"]
    zeros = [c.a[0], torch.zeros_like(c.a[1]), c.a[2]]
    assert relative(merged["conv.weight"].T, mats(c.weights, zeros, c.b).weight) < 1e-6


def test_statistics_are_read_one_window_ahead(family) -> None:
    _, models, base, readers = family
    asked = []

    class Watched(Held):
        def __getattr__(self, kind: str):
            find = super().__getattr__(kind)
            return lambda name: asked.append((kind, name)) or find(name)

    watched = [Watched(**reader.tables) for reader in readers]
    stream = stream_with_statistics(models, base, watched, window=1)
    assert not asked
    assert next(stream)[0] == "q.weight"
    assert ("block_fisher", "ia3") not in asked
    assert {name for name, *_ in stream} == set(base) - {"q.weight"}
    assert ("block_fisher", "ia3") in asked
    assert asked.count(("input_gram", "conv")) == 3


def test_errors(family) -> None:
    _, models, base, readers = family
    with pytest.raises(ValueError, match="2 entries for 3 models"):
        merge_with_statistics(models, base, readers[:2])
    with pytest.raises(ValueError, match="statistics of another model"):
        readers[0].tables["input_gram"]["q"] = torch.eye(9)
        merge_with_statistics(models, base, readers)
    with pytest.raises(TypeError, match="regmean has no option 'damping'"):
        merge_with_statistics(models, base, readers, "regmean", damping=1)
    with pytest.raises(ValueError, match="pass base="):
        merge_with_statistics(models, None, readers, init="pretrained")
    with pytest.raises(ValueError, match="method='slerp'"):
        merge_with_statistics(models, None, readers, "slerp")


def test_broken_statistics_are_warned_of_once(family) -> None:
    _, models, base, readers = family
    for name in ("q", "conv"):
        readers[2].tables["output_grad_gram"][name][0, 0] = torch.nan
    with pytest.warns(UserWarning, match=r"2 layers \(q.weight, conv.weight\)") as record:
        merged, _ = merge_with_statistics(models, base, readers)
    assert len(record) == 1
    assert all(bool(t.isfinite().all()) for t in merged.values())


def test_reports_as_table_and_json(family, tmp_path: Path) -> None:
    _, models, base, readers = family
    _, reports = merge_with_statistics(models, base, readers)
    lines = as_table(reports).splitlines()
    assert lines[0].split()[:3] == ["layer", "status", "iterations"]
    assert len(lines) == len(reports) + 1
    held = json.loads(as_json(reports))
    assert sum(held["summary"].values()) == len(held["layers"]) == len(reports)
    write_reports(tmp_path / "r.json", reports)
    assert json.loads((tmp_path / "r.json").read_text()) == held
    write_reports(tmp_path / "r.txt", reports)
    assert (tmp_path / "r.txt").read_text().startswith("layer")


@pytest.mark.parametrize("with_base", [True, False])
def test_counters_that_differ_are_one_warning(family, with_base: bool) -> None:
    _, models, base, readers = family
    for k, model in enumerate(models):
        model |= {f"count{i}": torch.tensor(k) for i in range(6)}
    base |= {f"count{i}": torch.tensor(9) for i in range(6)}
    with pytest.warns(UserWarning, match="tensors are not merged") as caught:
        merge_with_statistics(models, base if with_base else None, readers, "fisher")
    (text,) = [str(w.message) for w in caught if "not merged" in str(w.message)]
    assert "'count3' and 2 others" in text
    assert text.endswith(f"the {'base' if with_base else 'first model'}'s are taken")


def test_advice_on_large_steps_is_what_the_solver_has() -> None:
    far = [
        MatsReport("a", "iterations", "cg", step=30.0),
        MatsReport("b", "exact", "exact", step=40.0),
    ]
    plain, exact = warnings_of(far)
    assert plain.startswith("1 layer (a)") and plain.endswith("or set a step limit")
    assert exact.startswith("1 layer (b)") and "damping" not in exact and "off_diagonal" in exact


@pytest.mark.parametrize("shape", [(5,), (1, 5), (5, 1), (1, 5, 1)])
@pytest.mark.parametrize("method", ["mats", "regmean"])
def test_vectors_of_any_shape_are_solved_as_vectors(shape: tuple[int, ...], method: str) -> None:
    """M16."""
    c = case(3, 1, 5, dtype=torch.float32)
    readers = [Held(block_fisher={"ia3": gram}) for gram in c.a]
    models = [{"ia3": w.reshape(shape)} for w in c.weights]
    merged, reports = merge_with_statistics(models, None, readers, method)
    own = {"mats": mats, "regmean": regmean}[method](c.weights, c.a)
    assert merged["ia3"].shape == shape
    assert relative(merged["ia3"].reshape(1, 5), own.weight) < 1e-6
    assert [r.status for r in reports] == [own.report.status]


@pytest.mark.parametrize("method", ["mats", "fisher"])
def test_negative_statistics_are_warned_of(method: str) -> None:
    """N5."""
    c = case(2, 4, 5, dtype=torch.float32)
    tables = [{"q": gram} for gram in c.a]
    readers = [
        Held(input_gram=table, diagonal_fisher={"q.weight": w.abs()})
        for table, w in zip(tables, c.weights, strict=True)
    ]
    tables[1]["q"] = -c.a[1]
    readers[0].tables["diagonal_fisher"]["q.weight"][0, 0] = -1.0
    models = [{"q.weight": w} for w in c.weights]
    with pytest.warns(UserWarning, match=r"1 layer \(q.weight\) has statistics with negative"):
        _, reports = merge_with_statistics(models, None, readers, method)
    assert [r.status for r in reports] == ["not_positive"]
