"""`pymerge.sweep`: results are those of single merges, bit for bit, and the best one is kept."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from folder_cases import family
from solve_cases import write_statistics

import pymerge
from pymerge.engine.mappings import Mappings
from pymerge.errors import ConfigError, EvaluationError, MergeError, OutputError

DENSITIES = [0.1, 0.5, 1.0]
GRIDS = {
    "ties": {"density": DENSITIES, "scaling": [0.5, 1.3], "normalize": [True, False]},
    "task_arithmetic": {"scaling": [0.5, -1.0, 2.0]},
    "linear": {"weights": [[1, 1, 1], [0.2, 0.5, 0.3]], "normalize": [True, False]},
    "dare_ties": {"density": [0.3, 0.6], "seed": [0, 7], "rescale": [True, False]},
    "dare_linear": {"density": [0.3, 0.6], "scaling": [1.0, 0.5]},
    "breadcrumbs": {"density": [0.4, 0.8], "gamma": [0.01, 0.1]},
    "breadcrumbs_ties": {"density": [0.4, 0.8], "scaling": [1.0, 0.5]},
    "della": {"density": [0.4, 0.5], "epsilon": [0.1, 0.2]},
    "karcher": {"max_iter": [1, 20]},
    "multislerp": {"weights": [[1, 1, 1], [1, 2, 3]]},
    "model_stock": {"filter_wise": [False, True]},
    "sce": {"select_topk": [0.2, 0.7]},
    "ram": {},
    "tsv": {"scaling": [1.0, 0.4]},
}
FLAVORS = {"density": DENSITIES, "flavor": ["mergekit", "peft", "paper"], "elect": ["sum", "count"]}


def states(dtype=torch.float32):
    base, *models = family(3, dtype)
    return models, base


def assert_equal(one, other):
    assert list(one) == list(other)
    for name in one:
        assert one[name].dtype == other[name].dtype
        pair = [x.reshape(-1).view(torch.uint8) for x in (one[name], other[name])]
        assert torch.equal(*pair), name


def bases(method, models, base):
    return (models, None) if method in ("linear", "karcher") else (models, base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", GRIDS)
def test_results_are_those_of_single_merges(method, dtype):
    models, base = bases(method, *states(dtype))
    seen = []
    swept = pymerge.sweep(
        models,
        base,
        GRIDS[method] or [{}],
        method=method,
        at_once=3,
        evaluate=lambda state: seen.append({n: x.clone() for n, x in state.items()}) or len(seen),
    )
    assert len(seen) == len(swept.rows)
    for row, state in zip(swept.rows, seen, strict=True):
        assert_equal(state, pymerge.merge(models, base, method=method, **row.setting))
    assert swept.best is swept.rows[-1]
    assert_equal(swept.merged, seen[-1])


def test_methods_by_statistics(tmp_path):
    models, base = states()
    files = [tmp_path / f"{k}.safetensors" for k in range(3)]
    for k, (path, state) in enumerate(zip(files, models, strict=True)):
        write_statistics(path, state, k, kinds=("input_gram", "diagonal_fisher"))
    grid = [
        {"method": "fisher"},
        {"method": "regmean", "off_diagonal": 0.9},
        {"method": "ties"},
        {"method": "regmean", "off_diagonal": 0.5},
    ]
    seen = []
    swept = pymerge.sweep(
        models,
        base,
        grid,
        statistics=files,
        evaluate=lambda state: seen.append({n: x.clone() for n, x in state.items()}) or 1.0,
    )
    for row, state in zip(swept.rows, seen, strict=True):
        own = {} if row.setting["method"] == "ties" else {"statistics": files}
        assert_equal(state, pymerge.merge(models, base, **own, **row.setting))
    assert_equal(swept.merged, seen[0])


def test_flavors_and_methods_in_one_grid():
    models, base = states()
    grid = [
        *({"density": d, "flavor": f} for d in DENSITIES for f in ("mergekit", "peft", "paper")),
        {"method": "task_arithmetic", "scaling": 0.3},
        {"method": "sce", "select_topk": 0.5},
        {"method": "ties", "density": 0.2, "scope": "model", "zero_sign": "majority"},
    ]
    for row in pymerge.sweep(models, base, grid, at_once=len(grid)).rows:
        assert_equal(row.merged, pymerge.merge(models, base, **row.setting))


def test_methods_that_take_the_base_as_a_model():
    models, base = states()
    swept = pymerge.sweep(
        models[:1],
        base,
        [{"method": "slerp", "t": 0.3}, {"method": "ties"}, {"method": "slerp", "t": 0.9}],
    )
    for row in swept.rows:
        assert_equal(row.merged, pymerge.merge(models[:1], base, **row.setting))


def test_tied_integer_and_running_tensors():
    models, base = states()
    for state in (*models, base):
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
        state["norm.running_mean"] = state["model.norm.weight"].clone()
        state["steps"] = torch.tensor(3)
    kept = []

    def evaluate(state):
        assert state["lm_head.weight"] is state["model.embed_tokens.weight"]
        kept.append({name: x.clone() for name, x in state.items()})
        return 0.0

    densities = [0.2, 0.4, 0.6]
    with pytest.warns(UserWarning, match="running_mean"):
        pymerge.sweep(models, base, {"density": densities}, at_once=1, evaluate=evaluate)
        for density, state in zip(densities, kept, strict=True):
            assert_equal(state, pymerge.merge(models, base, density=density))


def test_the_inputs_are_read_once_for_all_settings(monkeypatch):
    made = []
    monkeypatch.setattr(
        Mappings,
        "__init__",
        lambda self, *a, _init=Mappings.__init__: made.append(1) or _init(self, *a),
    )
    models, base = states()
    pymerge.sweep(models, base, {"density": DENSITIES, "scaling": [1.0, 2.0]})
    assert len(made) == 1


class Asked(dict):
    """Gives a tensor of its own whenever it is asked, as mappings do that read files."""

    count = 0

    def __getitem__(self, name):
        Asked.count += 1
        return super().__getitem__(name).clone()


def test_several_results_come_of_one_read():
    models, base = states()
    inputs = [Asked(model) for model in models]
    counts = []
    for at_once in (1, 3):
        Asked.count = 0
        swept = pymerge.sweep(
            inputs,
            base,
            {"density": DENSITIES},
            at_once=at_once,
            evaluate=lambda state: -float(state["model.norm.weight"].abs().sum()),
        )
        counts.append(Asked.count)
        assert_equal(swept.merged, pymerge.merge(models, base, **swept.best.setting))
    tensors = len(models) * len(base)
    assert counts[0] - counts[1] >= 2 * tensors  # three reads against one


def test_memory_of_results_is_used_again():
    models, base = states()
    places = set()

    def evaluate(state):
        places.add(next(iter(state.values())).data_ptr())
        return -len(places)  # the first is the best

    swept = pymerge.sweep(
        models, base, {"scaling": [k / 8 for k in range(12)]}, at_once=2, evaluate=evaluate
    )
    assert len(places) == 3  # two at once, and the best
    assert swept.best is swept.rows[0]
    assert_equal(swept.merged, pymerge.merge(models, base, scaling=0.0))


def test_an_evaluation_may_take_the_dict_apart():
    models, base = states()
    swept = pymerge.sweep(
        models,
        base,
        {"scaling": [0.5, 1.0, 1.5]},
        at_once=1,
        evaluate=lambda state: state.clear() or 1.0,
    )
    assert_equal(swept.merged, pymerge.merge(models, base, scaling=0.5))


@pytest.mark.parametrize(("maximize", "best"), [(True, 2.0), (False, 0.5)])
def test_the_measure_that_decides(maximize, best, tmp_path):
    models, base = states()
    scores = iter([1.0, float("nan"), 2.0, 0.5])
    swept = pymerge.sweep(
        models,
        base,
        {"scaling": [0.1, 0.2, 0.3, 0.4]},
        evaluate=lambda state: {"loss": 1, "accuracy": torch.tensor(next(scores))},
        metric="accuracy",
        maximize=maximize,
    )
    assert swept.best.metrics["accuracy"] == best
    assert_equal(swept.merged, pymerge.merge(models, base, **swept.best.setting))


def test_tables_and_plot(tmp_path):
    models, base = states()
    swept = pymerge.sweep(
        models,
        base,
        {"weights": [[1, 2, 3], [1, 1, 1]], "density": [0.5, 0.25]},
        evaluate=lambda s: 0.5,
    )
    swept.write_csv(tmp_path / "t.csv")
    with (tmp_path / "t.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {"weights": "[1, 2, 3]", "density": "0.5", "score": "0.5"}
    swept.write_json(tmp_path / "t.json")
    content = json.loads((tmp_path / "t.json").read_text())
    assert content["best"] == {"weights": [1, 2, 3], "density": 0.5}
    assert [row["setting"]["density"] for row in content["rows"]] == [0.5, 0.25, 0.5, 0.25]
    from pymerge.sweeps.results import lines_of

    axis, lines = lines_of(swept)
    assert axis == "density" and lines["weights=[1,1,1]"] == [(0.25, 0.5), (0.5, 0.5)]
    pytest.importorskip("matplotlib")
    swept.plot(tmp_path / "t.svg")
    assert (tmp_path / "t.svg").read_text().rstrip().endswith("</svg>")
    with pytest.raises(ValueError, match="nothing was evaluated"):
        pymerge.sweep(models, base, {"density": [0.5]}).plot(tmp_path / "u.svg")


def test_a_sweep_goes_on_where_it_stopped(tmp_path):
    models, base = states()
    results = tmp_path / "sweep.json"
    asked = []

    def evaluate(state, fail_at=None):
        if len(asked) == fail_at:
            raise RuntimeError("out of luck")
        asked.append(1)
        return float(10 - len(asked))

    grid = {"density": [0.2, 0.4, 0.6]}
    with pytest.raises(RuntimeError, match="out of luck"):
        pymerge.sweep(models, base, grid, evaluate=lambda s: evaluate(s, 2), results=results)
    swept = pymerge.sweep(models, base, grid, evaluate=evaluate, results=results)
    assert len(asked) == 3 and [row.metrics["score"] for row in swept.rows] == [9.0, 8.0, 7.0]
    assert_equal(swept.merged, pymerge.merge(models, base, density=0.2))  # known, and merged again
    # A larger grid asks for what is new; a smaller one loses nothing.
    pymerge.sweep(models, base, {"density": [0.8]}, evaluate=evaluate, results=results)
    assert len(asked) == 4 and len(json.loads(results.read_text())["rows"]) == 4
    with pytest.raises(OutputError, match="of another sweep"):
        pymerge.sweep(models, base, grid, evaluate=evaluate, results=results, weights=[1, 1, 2])
    results.write_text("{")
    with pytest.raises(OutputError, match="is not readable JSON"):
        pymerge.sweep(models, base, grid, evaluate=evaluate, results=results)


@pytest.mark.parametrize(
    ("grid", "error", "match"),
    [
        ({}, ConfigError, "has no setting"),
        ([], ConfigError, "has no setting"),
        ({"density": []}, ConfigError, "has no setting"),
        ({"density": 0.5}, TypeError, r"grid\['density'\] is a float; pass a list"),
        ({"density": "0.5"}, TypeError, "is a str; pass a list"),
        ("density", TypeError, "grid is a str"),
        ([0.5], TypeError, r"grid\[0\] is a float"),
        ({"density": [0.5, 0.5]}, ConfigError, "'density=0.5' twice"),
        ({"density": [object()]}, TypeError, "density=<object"),
        ({"density": [0.5, 2]}, ValueError, r"density=2 is outside \[0, 1\]"),
        ({"densty": [0.5]}, TypeError, "did you mean 'density'"),
        ({"method": ["ties", "tise"]}, ConfigError, "did you mean 'ties'"),
        ({"out": [None]}, TypeError, "no parameter 'out'"),
        ({"density": range(200), "scaling": range(200)}, ConfigError, "40,000 settings"),
        ({"density": range(10**12)}, ConfigError, "1,000,000,000,000 settings"),
        ({"density": range(10**30)}, ConfigError, "more than 1,000,000,000,000,000 settings"),
    ],
)
def test_grids_that_are_refused_before_any_work(grid, error, match):
    models, base = states()

    def evaluate(state):
        raise AssertionError("nothing should be evaluated")

    with pytest.raises(error, match=match):
        pymerge.sweep(models, base, grid, evaluate=evaluate)


def test_models_that_do_not_match_are_refused_before_any_work():
    models, base = states()
    models[1]["model.norm.weight"] = torch.zeros(3)
    with pytest.raises(MergeError, match="shape"):
        pymerge.sweep(models, base, {"density": [0.5]}, evaluate=pytest.fail)


@pytest.mark.parametrize("found", [None, "0.5", True, {}, {"a": "b"}, [1, 2]])
def test_evaluations_that_give_no_number(found):
    models, base = states()
    with pytest.raises(EvaluationError, match=r"density=0\.5"):
        pymerge.sweep(models, base, {"density": [0.5]}, evaluate=lambda state: found)


def test_a_measure_that_is_not_there():
    models, base = states()
    with pytest.raises(EvaluationError, match="gave a and no 'b'"):
        pymerge.sweep(models, base, {"density": [0.5]}, evaluate=lambda s: {"a": 1}, metric="b")


def test_arguments_that_are_refused():
    models, base = states()
    with pytest.raises(TypeError, match="grid is missing"):
        pymerge.sweep(models, base)
    with pytest.raises(TypeError, match="evaluate is a float"):
        pymerge.sweep(models, base, {"density": [0.5]}, evaluate=0.5)
    with pytest.raises(ValueError, match="at_once=0 is below 1"):
        pymerge.sweep(models, base, {"density": [0.5]}, at_once=0)
    with pytest.raises(ValueError, match="results is for measures"):
        pymerge.sweep(models, base, {"density": [0.5]}, results="x.json")
    with pytest.raises(TypeError, match="no setting has a method with a parameter 'statistics'"):
        pymerge.sweep(models, base, {"density": [0.5]}, statistics=[])


def load_state_dict(base, merged):
    base.load_state_dict(merged)


def train(base, merged):
    torch.optim.SGD(base.parameters(), 0.1).zero_grad()
    base(torch.ones(1, 4)).sum().backward()
    torch.optim.SGD(base.parameters(), 0.1).step()


@pytest.mark.parametrize("act", [load_state_dict, train])
@pytest.mark.parametrize("written", ["base", "models"])
def test_an_evaluation_that_writes_to_an_input(written, act, tmp_path):
    base, *models = (torch.nn.Linear(4, 3) for _ in range(3))
    first = models[0] if written == "models" else base

    def evaluate(merged):
        act(first, merged)
        return 1.0

    grid, results = {"density": [0.2, 0.5]}, tmp_path / "sweep.json"
    label = "base" if written == "base" else r"models\[0\]"
    with pytest.raises(EvaluationError, match=f"{label} was written to .*: bias, weight; evaluate"):
        pymerge.sweep(models, base, grid, evaluate=evaluate, results=results)
    assert len(json.loads(results.read_text())["rows"]) == 1  # which was merged before


def test_an_evaluation_that_replaces_tensors_of_an_input():
    models, base = states()

    def evaluate(merged):
        models[1].update({name: tensor.clone() for name, tensor in merged.items()})
        return 1.0

    with pytest.raises(EvaluationError, match=r"models\[1\] was written to"):
        pymerge.sweep(models, base, {"density": [0.2, 0.5]}, evaluate=evaluate)


def test_tensors_without_versions_can_be_swept():
    with torch.inference_mode():
        models, base = states()
    swept = pymerge.sweep(models, base, {"density": [0.2, 0.5]}, evaluate=lambda merged: 1.0)
    assert len(swept.rows) == 2


def test_a_subclass_whose_functions_raise_is_refused_as_by_a_merge():
    class Odd(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            raise RuntimeError("no")

    models, base = states()
    models[0] = {name: tensor.as_subclass(Odd) for name, tensor in models[0].items()}
    with pytest.raises(TypeError, match=r"pass \.as_subclass\(torch\.Tensor\) of it"):
        pymerge.sweep(models, base, {"density": [0.5]}, evaluate=pytest.fail)
