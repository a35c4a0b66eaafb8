"""Every method and every fault through both doors: model folders (`merge_checkpoints`) and state
dicts (`pymerge.merge`) give the same tensors, reports and notes, or the same kind of error.
"""

from __future__ import annotations

import copy
import json
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from folder_cases import State, assert_same, family, read_result, write_model
from mats_cases import relative
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from solve_cases import write_statistics

import pymerge
from pymerge.engine.merge import merge_checkpoints
from pymerge.errors import MismatchError, NonFiniteError
from pymerge.statistics import load

LAYER = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"  # it has no Gram matrices
KINDS = ("input_gram", "output_grad_gram", "diagonal_fisher")


@dataclass
class Case:
    """Models, their base and their statistics, as a test may damage them before both doors open."""

    states: list[State]  # the base is the first
    root: Path
    by_statistics: bool = False
    kinds: Sequence[str] = KINDS
    files: list[Path] = field(default_factory=list)
    with_base: bool = True

    def write(self, **change: Any) -> None:
        self.files = [
            write_statistics(self.root / f"{k}.stats", state, k, kinds=self.kinds, change=change)
            for k, state in enumerate(self.states)
            if k
        ]


@dataclass
class Outcome:
    """What a door gave. said: of the notes or warnings, which tensors they name."""

    tensors: State = field(default_factory=dict)
    reports: list[dict[str, Any]] = field(default_factory=list)
    notes: str = ""
    error: Exception | None = None


def by_folder(case: Case, method: str, parameters: dict[str, Any], **options: Any) -> Outcome:
    folders = [write_model(case.root / f"m{k}", state) for k, state in enumerate(case.states)]
    models: list[dict[str, Any]] = [{"model": str(folder)} for folder in folders[1:]]
    parameters = dict(parameters)
    weights = parameters.pop("weights", None)
    for k, model in enumerate(models):
        if weights is not None:
            model["parameters"] = {"weight": weights[k]}
        if case.by_statistics:
            model["statistics"] = str(case.files[k])
    config: dict[str, Any] = {"merge_method": method, "models": models, "parameters": parameters}
    if case.with_base:
        config["base_model"] = str(folders[0])
    out = case.root / "out"
    made = Outcome()
    try:
        summary = merge_checkpoints(config, out, **options)
    except Exception as error:
        made.error = error
        return made
    made.tensors = read_result(out)
    made.notes = "\n".join(summary.notes)
    if case.by_statistics:
        made.reports = json.loads((out / "merge_report.json").read_text())["layers"]
    for k, folder in enumerate(folders):
        name = f"models[{k - 1}]" if k else "base"
        made.notes = made.notes.replace(str(folder), name)
        for report in made.reports:
            report["message"] = report["message"].replace(str(folder), name)
    return made


def by_dict(case: Case, method: Any, options: dict[str, Any], wrap: Any = None) -> Outcome:
    made = Outcome()
    reports: list[Any] = []
    if case.by_statistics:
        files = [load(file) for file in case.files] if wrap else case.files
        options = options | {"statistics": [*map(wrap, files)] if wrap else files}
        options["reports"] = reports
    base = case.states[0] if case.with_base else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            made.tensors = pymerge.merge(case.states[1:], base, method=method, **options)
        except Exception as error:
            made.error = error
    made.notes = "\n".join(str(each.message) for each in caught)
    made.reports = [report.as_dict() for report in reports]
    return made


def same(folder: Outcome, state_dict: Outcome, exact: bool = True) -> None:
    assert folder.error is None and state_dict.error is None, (folder.error, state_dict.error)
    solved = {r["name"] for r in folder.reports if r["solver"] in ("cg", "exact")}
    assert sorted(folder.tensors) == sorted(state_dict.tensors)
    rest = [
        {n: t for n, t in each.tensors.items() if n not in solved} for each in (folder, state_dict)
    ]
    assert_same(*rest)
    for name in solved:
        assert folder.tensors[name].dtype == state_dict.tensors[name].dtype
        assert relative(folder.tensors[name], state_dict.tensors[name]) < 2e-6, name
    assert exact == (not solved)
    same_reports(folder.reports, state_dict.reports)


def same_reports(folder: list[dict[str, Any]], state_dict: list[dict[str, Any]]) -> None:
    """Equal but for the rounding of the numbers, which depends on where matrices lie."""
    ours = {report["name"]: report for report in state_dict}
    assert sorted(report["name"] for report in folder) == sorted(ours)
    for report in folder:
        other = ours[report["name"]]
        assert set(report) == set(other)
        for key, value in report.items():
            if isinstance(value, float):
                assert value == pytest.approx(other[key], rel=1e-3, abs=1e-9), (report, other)
            elif key == "trace_shares":
                assert value == pytest.approx(other[key], rel=1e-5)
            else:
                assert value == other[key], (report, other)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(family(2, torch.float32), tmp_path)


ELEMENTWISE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": ({}, {}),
    "task_arithmetic": ({"lambda": 0.7}, {"scaling": 0.7}),
    "ties": ({"density": 0.4}, {"density": 0.4}),
    "dare_linear": ({"density": 0.5}, {"density": 0.5}),
    "dare_ties": ({"density": 0.6, "rescale": False}, {"density": 0.6, "rescale": False}),
    "breadcrumbs": ({"density": 0.6, "gamma": 0.1}, {"density": 0.6, "gamma": 0.1}),
    "breadcrumbs_ties": ({"density": 0.6, "gamma": 0.1}, {"density": 0.6, "gamma": 0.1}),
    "della": ({"density": 0.5, "epsilon": 0.2}, {"density": 0.5, "epsilon": 0.2}),
    "della_linear": ({"density": 0.5, "rescale": False}, {"density": 0.5, "rescale": False}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("method", ELEMENTWISE)
def test_elementwise_methods(case: Case, method: str, dtype: torch.dtype) -> None:
    case.states = family(2, dtype)
    case.with_base = method != "linear"
    parameters, options = ELEMENTWISE[method]
    weights = {"weights": [0.3, 0.7]}
    folder = by_folder(case, method, parameters | weights, seed=3)
    seed = {} if method == "linear" else {"seed": 3}
    same(folder, by_dict(case, method, options | weights | seed))


UNDER_MASKS: dict[str, dict[str, Any]] = {
    "nearswap": {"t": 0.05},
    "ram": {"epsilon": 0.05},
    "ramplus_tl": {"epsilon": 0.05, "r": 0.5, "alpha": 1.0},
    "sce": {"select_topk": 0.5, "flavor": "paper"},
    "arcee_fusion": {"flavor": "mergekit"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", UNDER_MASKS)
def test_methods_under_masks(case: Case, method: str, dtype: torch.dtype) -> None:
    count = 1 if method in ("nearswap", "arcee_fusion") else 2
    case.states = family(count, dtype)
    parameters = UNDER_MASKS[method]
    state_dict = by_dict(case, method, parameters)
    same(by_folder(case, method, parameters), state_dict)
    # One by one, by the function of that name.
    base, *models = case.states
    for name, tensor in state_dict.tensors.items():
        made = getattr(pymerge, method)([m[name] for m in models], base[name], **parameters)
        assert torch.equal(made, tensor), name
    whole = getattr(pymerge, method)(models, base, **parameters)
    assert_same(whole, state_dict.tensors)


@pytest.mark.parametrize("method", ["sce", "arcee_fusion"])
def test_flavors_of_methods_under_masks(case: Case, method: str) -> None:
    """A recipe has mergekit's numbers where it says nothing, and Python the paper's."""
    count = 1 if method == "arcee_fusion" else 2
    base, *models = family(count, torch.float32)
    case.states = [base, *({n: base[n] + (m[n] - base[n]) * 1e-4 for n in base} for m in models)]
    by_name = {f: by_dict(case, method, {"flavor": f}).tensors for f in ("mergekit", "paper")}
    assert_same(by_folder(case, method, {}).tensors, by_name["mergekit"])
    assert_same(by_dict(case, method, {}).tensors, by_name["paper"])
    assert_same(getattr(pymerge, method)(case.states[1:], base), by_name["paper"])
    assert any(not torch.equal(by_name["paper"][n], by_name["mergekit"][n]) for n in base)


# (parameters of the recipe, options)
ON_MATRICES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "wudi": ({"iterations": 3, "damping": 0.3}, {"iterations": 3, "damping": 0.3}),
    "tsv": ({"lambda": 0.7}, {"scaling": 0.7}),
    "iso_c": ({"lambda": 1.3}, {"scaling": 1.3}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ON_MATRICES)
def test_methods_on_matrices(case: Case, method: str, dtype: torch.dtype) -> None:
    case.states = family(3, dtype)
    parameters, options = ON_MATRICES[method]
    folder = by_folder(case, method, parameters)
    reports: list[Any] = []
    said = {"reports": reports} if method == "wudi" else {}
    state_dict = by_dict(case, method, options | said)
    if method == "wudi":
        path = case.root / "out" / "merge_report.json"
        folder.reports = json.loads(path.read_text())["layers"]
        state_dict.reports = [report.as_dict() for report in reports]
        assert len(reports) == 4
    same(folder, state_dict, exact=method != "wudi")
    # One by one, by the function of that name.
    base, *models = case.states
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = getattr(pymerge, method)(models, base, **options)
    assert_same(whole, state_dict.tensors)


# (method, parameters of both doors, whether there is a base, number of models)
GEOMETRIC: list[tuple[str, dict[str, Any], bool, int]] = [
    ("slerp", {"t": 0.3, "flavor": "paper"}, True, 1),
    ("nuslerp", {"weights": [0.3, 0.7]}, False, 2),
    ("nuslerp", {"weights": [0.3, 0.7], "nuslerp_flatten": False}, True, 2),
    (
        "nuslerp",
        {"weights": [0.3, 0.7], "nuslerp_flatten": False, "nuslerp_row_wise": True},
        True,
        2,
    ),
    ("multislerp", {"weights": [0.3, 0.7], "eps": 1e-6}, True, 2),
    ("multislerp", {"weights": [0.3, 0.9], "normalize_weights": False}, False, 2),
    ("karcher", {"max_iter": 4}, False, 2),
    ("model_stock", {"flavor": "paper"}, True, 2),
    ("model_stock", {"filter_wise": True, "flavor": "mergekit"}, True, 2),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("method", "parameters", "with_base", "count"), GEOMETRIC)
def test_methods_by_gram_matrix(
    case: Case,
    method: str,
    parameters: dict[str, Any],
    with_base: bool,
    count: int,
    dtype: torch.dtype,
) -> None:
    case.states = family(2, dtype)[: count + 1]
    case.with_base = with_base
    same(by_folder(case, method, parameters), by_dict(case, method, parameters))


@pytest.mark.parametrize("scale", [None, 0.5])
def test_passthrough(case: Case, scale: float | None) -> None:
    case.states, case.with_base = case.states[:2], False
    given = {} if scale is None else {"scale": scale}
    same(by_folder(case, "passthrough", given), by_dict(case, "passthrough", given))


STATISTICS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("mats", {}, {}),
    ("mats", {"init": "task_arithmetic", "lambda": 0.4}, {"init": "task_arithmetic", "init_options": {"scaling": 0.4}}),
    ("mats", {"init": "ties", "density": 0.5}, {"init": "ties", "init_options": {"density": [0.5, 0.5]}}),
    ("mats", {"init": "pretrained", "flavor": "paper", "iterations": 7, "task_weights": "trace"},
     {"init": "pretrained", "flavor": "paper", "iterations": 7, "task_weights": "trace"}),
    ("mats", {"init": "zero", "output_grams": False}, {"init": "zero", "output_grams": False}),
    ("mats", {"solver": "exact", "weights": [1, 3]}, {"solver": "exact", "task_weights": [1, 3]}),
    ("regmean", {"off_diagonal": 0.9}, {"off_diagonal": 0.9}),
    ("regmean", {"init": "ties"}, {"init": "ties"}),
    ("fisher", {"minimum": 1e-8}, {"minimum": 1e-8}),
    ("fisher", {"init": "pretrained"}, {"init": "pretrained"}),
    ("fisher", {"init": "ties"}, {"init": "ties"}),
]  # fmt: skip


class Plain:
    """The methods of a reader alone: nothing describes what it has."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader
        self.header = {"layers": reader.header["layers"], "weights": reader.header["weights"]}
        self.shares_input = reader.shares_input

    def __getattr__(self, name: str) -> Any:
        if name not in (*KINDS, "block_fisher"):
            raise AttributeError(name)
        return getattr(self._reader, name)


@pytest.mark.parametrize(("method", "parameters", "options"), STATISTICS)
def test_methods_by_statistics(
    case: Case, method: str, parameters: dict[str, Any], options: dict[str, Any]
) -> None:
    dtype = torch.bfloat16 if "init" in parameters else torch.float32
    case.states, case.by_statistics = family(2, dtype), True
    case.write()
    folder = by_folder(case, method, parameters)
    for wrap in (None, Plain):
        same(folder, by_dict(case, method, options, wrap), exact=method == "fisher")


# Faults: what is done to the case, and the error of both doors.

Damage = Callable[[Case], object]


def change(model: int, name: str, value: Any) -> Damage:
    """Give a tensor's last element, or all of the tensor, another value."""

    def damage(case: Case) -> None:
        if isinstance(value, float):
            case.states[model][name] = case.states[model][name].clone()
            case.states[model][name].view(-1)[-1] = value
        else:
            case.states[model][name] = value

    return damage


def every(name: str, values: Sequence[Any]) -> Damage:
    return lambda case: [change(k, name, value)(case) for k, value in enumerate(values)]


FAULTS: dict[str, tuple[Damage, type[Exception]]] = {
    "missing": (lambda case: case.states[2].pop(LAYER), MismatchError),
    "one more": (change(1, "model.layers.0.more.weight", torch.ones(3)), MismatchError),
    "shape": (change(2, LAYER, torch.ones(24, 15)), MismatchError),
    "nan in a weight": (change(1, LAYER, math.nan), NonFiniteError),
    "infinity in a bias": (change(2, NORM, math.inf), NonFiniteError),
    "integers beside floats": (change(1, NORM, torch.ones(16, dtype=torch.int64)), MismatchError),
}
NEEDS_BASE = {"linear": False, "ties": True, "sce": True, "mats": True, "fisher": True}
WEIGHTED = ("linear", "ties")
NEEDS_BASE = {
    "linear": False,
    "ties": True,
    "multislerp": False,
    "model_stock": True,
    "mats": True,
    "fisher": True,
}


def weights_of(case: Case, method: str) -> dict[str, Any]:
    if method == "model_stock":
        return {"flavor": "paper"}
    return {} if case.by_statistics else {"weights": [1, 1]}


@pytest.mark.parametrize("method", NEEDS_BASE)
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_models(case: Case, fault: str, method: str) -> None:
    case.by_statistics = method in ("mats", "fisher")
    case.with_base = NEEDS_BASE[method]
    case.write(weights={})  # which would say that these are not the models that they are of
    damage, kind = FAULTS[fault]
    damage(case)
    options: dict[str, Any] = {"weights": [1, 1]} if method in WEIGHTED else {}
    options = weights_of(case, method)
    folder, state_dict = by_folder(case, method, options), by_dict(case, method, options)
    assert type(folder.error) is type(state_dict.error) is kind, (folder.error, state_dict.error)


@pytest.mark.parametrize("method", NEEDS_BASE)
def test_names_and_tensors_that_not_all_models_have(case: Case, method: str) -> None:
    """A prefix, a head of its own, and one that the others lack."""
    case.by_statistics = method in ("mats", "fisher")
    case.with_base = NEEDS_BASE[method]
    for k, state in enumerate(case.states):
        if k:
            state["score.weight"] = torch.ones(2, 16)
        state["pooler.weight"] = torch.full((16, 16), float(k))
    del case.states[2]["pooler.weight"]
    case.states[2] = {f"model.{name}": tensor for name, tensor in case.states[2].items()}
    case.write()
    options: dict[str, Any] = {"weights": [1, 1]} if method in WEIGHTED else {}
    options = weights_of(case, method)
    options |= {"density": 0.5} if method == "ties" else {}
    folder, state_dict = by_folder(case, method, options), by_dict(case, method, options)
    same(folder, state_dict, exact=method != "mats")
    assert ("score.weight" in folder.tensors) == (not case.with_base)
    assert folder.tensors["pooler.weight"].unique().tolist() == [0 if case.with_base else 1]
    for said in ("models[1] has other names", "pooler.weight", "score.weight")[
        : 2 + case.with_base
    ]:
        lines = [
            # Without the example in parentheses, which is the first of a file or of a dict.
            [re.sub(r"\(.*\)", "", n) for n in each.notes.splitlines() if said in n]
            for each in (folder, state_dict)
        ]
        assert lines[0] == lines[1] != [], said
    case.root /= "strict"
    folder = by_folder(case, method, options, strict=True)
    state_dict = by_dict(case, method, options | {"strict": True})
    assert type(folder.error) is type(state_dict.error) is MismatchError


@pytest.mark.parametrize("fused", ["base", "model"])
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_experts_in_one_tensor_and_one_by_one(case: Case, method: str, fused: str) -> None:
    case.with_base = method == "ties"
    stack = "model.layers.0.mlp.experts"
    first = 0 if case.with_base else 1  # gives the names
    for k, state in enumerate(case.states):
        gate_up, down = torch.randn(3, 12, 16), torch.randn(3, 16, 6)
        if (fused == "base") == (k == first):
            state |= {f"{stack}.gate_up_proj": gate_up, f"{stack}.down_proj": down}
            continue
        for e in range(3):
            state[f"{stack}.{e}.gate_proj.weight"] = gate_up[e, :6].clone()
            state[f"{stack}.{e}.up_proj.weight"] = gate_up[e, 6:].clone()
            state[f"{stack}.{e}.down_proj.weight"] = down[e].clone()
    options: dict[str, Any] = {"weights": [1, 1]}
    options |= {"density": 0.5} if method == "ties" else {}
    same(by_folder(case, method, options), by_dict(case, method, options))


@pytest.mark.parametrize("method", ["ties", "mats", "fisher"])
def test_a_base_that_is_not_finite(case: Case, method: str) -> None:
    case.by_statistics = method != "ties"
    case.write()
    change(0, LAYER, math.nan)(case)
    options: dict[str, Any] = {"init": "pretrained"} if case.by_statistics else {"weights": [1, 1]}
    folder = by_folder(case, method, options, allow_non_finite=method != "ties")
    allow = {"non_finite": "allow"} if case.by_statistics else {}
    state_dict = by_dict(case, method, options | allow)
    assert type(folder.error) is type(state_dict.error) is NonFiniteError


def test_passthrough_of_what_is_not_finite(case: Case) -> None:
    case.states, case.with_base = case.states[:2], False
    change(1, NORM, math.nan)(case)
    folder, state_dict = by_folder(case, "passthrough", {}), by_dict(case, "passthrough", {})
    assert type(folder.error) is type(state_dict.error) is NonFiniteError
    case.root /= "allowed"
    folder = by_folder(case, "passthrough", {}, allow_non_finite=True)
    same(folder, by_dict(case, "passthrough", {"non_finite": "allow"}))


def test_half_precision_that_overflows(case: Case) -> None:
    case.states = family(2, torch.float16)
    every(NORM, [torch.zeros(16).half(), *[torch.full((16,), 6e4).half()] * 2])(case)
    given = {"weights": [1, 1]}
    folder, state_dict = (
        by_folder(case, "task_arithmetic", given),
        by_dict(case, "task_arithmetic", given),
    )
    assert type(folder.error) is type(state_dict.error) is NonFiniteError


def test_an_initialisation_that_overflows(case: Case) -> None:
    """N4: a solved layer that falls back to it, and a tensor without statistics."""
    case.states, case.by_statistics = family(2, torch.float16), True
    for name in (LAYER, NORM):
        shape = case.states[0][name].shape
        given = [torch.zeros(shape), *[torch.full(shape, 6e4)] * 2]
        states = [each.half() for each in given]
        every(name, states)(case)
    case.write()
    options = {"init": "task_arithmetic"}
    folder, state_dict = by_folder(case, "mats", options), by_dict(case, "mats", options)
    assert type(folder.error) is type(state_dict.error) is NonFiniteError


@pytest.mark.parametrize("method", ["linear", "ties", "mats"])
def test_integers_that_differ(case: Case, method: str) -> None:
    case.by_statistics = method == "mats"
    case.with_base = method != "linear"
    every("count", [torch.tensor([k, 5]) for k in range(3)])(case)
    case.write()
    options: dict[str, Any] = {"weights": [1, 1]} if method in WEIGHTED else {}
    options |= {"density": 0.5} if method == "ties" else {}
    folder, state_dict = by_folder(case, method, options), by_dict(case, method, options)
    same(folder, state_dict, exact=method != "mats")
    assert folder.tensors["count"].tolist() == ([0, 5] if case.with_base else [1, 5])
    for each in (folder, state_dict):
        (note,) = [line for line in each.notes.splitlines() if "count" in line]
        assert "differs" in note and "int64" in note


# Faults of statistics.


@pytest.mark.parametrize("method", ["mats", "fisher"])
@pytest.mark.parametrize("wrap", [None, Plain])
def test_one_model_that_is_not_finite_is_left_out_where_that_is_allowed(
    case: Case, method: str, wrap: Any
) -> None:
    case.by_statistics = True
    case.write()
    change(2, LAYER, math.nan)(case)
    folder = by_folder(case, method, {}, allow_non_finite=True)
    state_dict = by_dict(case, method, {"non_finite": "allow"}, wrap)
    same(folder, state_dict, exact=method == "fisher")
    assert torch.equal(folder.tensors[LAYER], case.states[1][LAYER])
    assert_told(folder, state_dict, "1 layer (model.layers.0.mlp.up_proj.weight)")
    case.root /= "all"
    change(1, LAYER, math.nan)(case)
    folder = by_folder(case, method, {}, allow_non_finite=True)
    state_dict = by_dict(case, method, {"non_finite": "allow"}, wrap)
    assert type(folder.error) is type(state_dict.error) is NonFiniteError


def assert_told(folder: Outcome, state_dict: Outcome, text: str) -> None:
    """One note each, the same but for the order of names: a file's is by name."""
    words = [
        [sorted(re.findall(r"[\w.]+", line)) for line in each.notes.splitlines() if text in line]
        for each in (folder, state_dict)
    ]
    assert words[0] == words[1] and len(words[0]) == 1


@pytest.mark.parametrize(("method", "kind"), [("mats", "input_gram"), ("mats", "output_grad_gram"),
                                              ("regmean", "input_gram"), ("fisher", "diagonal_fisher")])  # fmt: skip
@pytest.mark.parametrize("wrap", [None, Plain])
def test_statistics_that_are_not_finite(case: Case, method: str, kind: str, wrap: Any) -> None:
    case.by_statistics = True
    case.write()
    sums = load_file(case.files[0])
    key = next(key for key in sums if key.startswith(f"{kind}/model.layers.1."))
    sums[key].view(-1)[0] = math.nan
    save_file(sums, case.files[0], metadata=safe_open(case.files[0], "pt").metadata())
    folder, state_dict = by_folder(case, method, {}), by_dict(case, method, {}, wrap)
    same(folder, state_dict, exact=method == "fisher")
    broken = [r for r in folder.reports if r["status"] == "non_finite"]
    assert broken and all("NaN or infinity" in r["message"] for r in broken)
    assert_told(folder, state_dict, "NaN or infinity")


def of_other_shapes(case: Case) -> None:
    small = {n: t[..., :8].contiguous() if t.dim() == 2 else t for n, t in case.states[1].items()}
    case.files[0] = write_statistics(case.files[0], small, 1, kinds=KINDS, change={"weights": {}})


STATISTICS_FAULTS: dict[str, tuple[Damage, dict[str, Any], str]] = {
    "of another model": (lambda case: case.files.reverse(), {}, "was not collected on models"),
    "of other shapes": (of_other_shapes, {}, "these are statistics of another model"),
    "no output Grams": (
        lambda case: [write_statistics(f, s, 1, kinds=("input_gram",)) for f, s in zip(case.files, case.states[1:], strict=True)],
        {"output_grams": True},
        "output_grams is true and no statistics file has their output_grad_gram",
    ),
    "three models solved exactly": (
        lambda case: (case.states.append(copy.copy(case.states[1])), case.write()),
        {"solver": "exact"},
        "takes one or two models with output Gram matrices",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrap", [None, Plain])
@pytest.mark.parametrize("fault", STATISTICS_FAULTS)
def test_faults_of_statistics(case: Case, fault: str, wrap: Any) -> None:
    case.by_statistics = True
    case.write()
    damage, options, words = STATISTICS_FAULTS[fault]
    damage(case)
    folder, state_dict = by_folder(case, "mats", options), by_dict(case, "mats", options, wrap)
    assert type(folder.error) is type(state_dict.error) is MismatchError
    assert words in str(state_dict.error)
    assert words.removesuffix(" models") in str(folder.error)


def test_statistics_of_another_kind(case: Case) -> None:
    case.by_statistics, case.kinds = True, ("output_grad_gram",)
    case.write()
    folder, state_dict = by_folder(case, "mats", {}), by_dict(case, "mats", {})
    assert type(folder.error) is type(state_dict.error) is MismatchError
    for outcome in (folder, state_dict):
        assert "needs input_gram; collect it" in str(outcome.error)


@pytest.mark.parametrize("kinds", [("input_gram",), KINDS])
@pytest.mark.parametrize("wrap", [None, Plain])
def test_statistics_of_some_models_or_kinds_alone(case: Case, kinds: Any, wrap: Any) -> None:
    """What is missing is in the reports of both, in the same words."""
    case.by_statistics, case.kinds = True, kinds
    case.write()
    if kinds is KINDS:
        case.files[1] = write_statistics(case.files[1], case.states[2], 2, layers=("q_proj",))
    folder, state_dict = by_folder(case, "mats", {}), by_dict(case, "mats", {}, wrap)
    same(folder, state_dict, exact=False)
    said = {report["message"] for report in folder.reports}
    where = "models[1]" if kinds is KINDS else "any model"
    what = "input_gram" if kinds is KINDS else "output_grad_gram"
    assert f"no {what} in the statistics of {where}" in said


# Arguments: a recipe's are ConfigErrors, Python's ValueErrors or TypeErrors.


@pytest.mark.parametrize(
    ("method", "parameters", "options"),
    [
        ("ties", {"density": 1.5}, {"density": 1.5}),
        ("ties", {"densty": 0.5}, {"densty": 0.5}),
        ("linear", {"weights": [1, -1]}, {"weights": [1, -1]}),
        ("tise", {}, {}),
        ("mats", {"damping": -1}, {"damping": -1}),
        ("mats", {"init": "pretrained"}, {"init": "pretrained"}),
        ("mats", {"solver": "cgs"}, {"solver": "cgs"}),
        ("regmean", {"off_diagonal": 2}, {"off_diagonal": 2}),
        ("fisher", {"dampning": 1}, {"dampning": 1}),
    ],
)
def test_arguments_that_are_wrong(
    case: Case, method: str, parameters: dict[str, Any], options: dict[str, Any]
) -> None:
    case.by_statistics = method in ("mats", "regmean", "fisher")
    case.with_base = method == "ties"
    case.write()
    folder, state_dict = by_folder(case, method, parameters), by_dict(case, method, options)
    assert isinstance(folder.error, ValueError)
    assert isinstance(state_dict.error, (ValueError, TypeError))
    assert not isinstance(state_dict.error, (MismatchError, NonFiniteError))


def test_no_base(case: Case) -> None:
    case.with_base = False
    for outcome in (by_folder(case, "ties", {"weights": [1, 1]}), by_dict(case, "ties", {})):
        assert isinstance(outcome.error, ValueError) and "base" in str(outcome.error)
