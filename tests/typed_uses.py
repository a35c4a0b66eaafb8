"""Uses of the public functions for mypy alone: nothing here runs. `test_types.py` checks it under
the project's strict settings.

A wrong use is marked with the error that it is to be, so that mypy complains where one of them
passes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from typing_extensions import assert_type

import pymerge
from pymerge.compat.peft import ties as peft_ties
from pymerge.engine.state_dict_statistics import Reader
from pymerge.engine.summary import MergeSummary
from pymerge.ops.mats.api import MatsReport, MatsResult
from pymerge.planning.plan import Plan

State = dict[str, torch.Tensor]


def tensors_give_a_tensor(x: torch.Tensor, parameter: torch.nn.Parameter) -> None:
    assert_type(pymerge.ties([x, x], x), torch.Tensor)
    assert_type(pymerge.ties((x, parameter), x, density=[0.1, 0.2], out=x), torch.Tensor)
    assert_type(pymerge.ties(x.unbind(), weights=x, scaling=np.float32(0.3)), torch.Tensor)
    assert_type(pymerge.ties([x], density=np.array([0.1]), seed=np.int64(3)), torch.Tensor)
    assert_type(pymerge.select([x, x], x, scope="model"), torch.Tensor)
    assert_type(pymerge.weighted_average([x, x], [x, x], minimum=1e-8), torch.Tensor)
    assert_type(pymerge.ties([x], trim="magprune", epsilon=[0.1], density=0.5), torch.Tensor)
    assert_type(pymerge.sce([x, x], x, select_topk=0.5, flavor="mergekit"), torch.Tensor)
    assert_type(pymerge.nearswap([x], x, t=np.float32(0.1), out=x), torch.Tensor)
    assert_type(pymerge.wudi([x, x], x, iterations=3, damping=0.3, reports=[]), torch.Tensor)
    assert_type(pymerge.tsv([x, x], x, scaling=np.float32(1.5), out=x), torch.Tensor)


def state_dicts_give_a_dict(
    a: State,
    ordered: OrderedDict[str, torch.Tensor],
    lazy: Mapping[str, torch.Tensor],
    module: torch.nn.Module,
) -> None:
    assert_type(pymerge.ties([a, a], a, trim="random", rescale="density", seed=1), State)
    assert_type(pymerge.ties([ordered, a], ordered, scope="model", out=a), State)
    assert_type(pymerge.ties([lazy, a], lazy), Mapping[str, torch.Tensor])
    assert_type(pymerge.merge([lazy, a], lazy, method="dare_ties", density=0.5), State)
    assert_type(pymerge.merge([module.state_dict()] * 2, method="linear", weight=[1, 2]), State)
    assert_type(pymerge.merge([a, a], a, normalize=False, backend="cpu", out=a), State)
    assert_type(pymerge.merge([a, a], a, method="ramplus_tl", r=0.1, alpha=1), State)
    assert_type(pymerge.ram([a, a], a, epsilon=1e-4), State)
    assert_type(pymerge.ramplus_tl([lazy, a], lazy), Mapping[str, torch.Tensor])
    assert_type(pymerge.arcee_fusion([ordered], ordered), State)
    assert_type(pymerge.iso_c([ordered, a], ordered, scaling=1.3), State)
    assert_type(pymerge.wudi([lazy, a], lazy), Mapping[str, torch.Tensor])
    assert_type(pymerge.merge([a, a], a, method="tsv", scaling=0.8), State)


def thresholds_are_by_name_or_over_the_model(a: State) -> None:
    assert_type(pymerge.select([a, a], a), State)
    assert_type(pymerge.select([a, a], a, scope="tensor", flavor="paper"), State)
    assert_type(pymerge.select([a, a], a, scope="model"), torch.Tensor)
    assert_type(pymerge.select([a, a], a, flavor="paper"), torch.Tensor)


def by_statistics(x: torch.Tensor, a: State, stats: pymerge.statistics.Statistics) -> None:
    assert_type(pymerge.mats([x, x], [x, x], [x, x], iterations=3, solver="cg"), MatsResult)
    assert_type(pymerge.mats([x, x], x, init=x).report, MatsReport)
    assert_type(pymerge.mats_many([pymerge.MatsLayer([x], [x])], backend="cpu"), list[MatsResult])
    assert_type(pymerge.regmean([x, x], [x, x], off_diagonal=0.9).weight, torch.Tensor)
    reader: Reader = stats
    reports: list[MatsReport] = []
    files: list[Reader | str | Path] = [reader, "b.safetensors", Path("c.safetensors")]
    pymerge.merge([a, a, a], a, method="mats", statistics=files, reports=reports, damping=0.1)
    merged, made = pymerge.merge_with_statistics([a], a, files, "fisher", minimum=1e-8)
    assert_type(merged, State)
    assert_type(made, list[MatsReport])


def folders() -> None:
    recipe = {"merge_method": "linear", "models": []}
    assert_type(pymerge.plan_checkpoints("recipe.yml", seed=3), Plan)
    assert_type(pymerge.merge_checkpoints(recipe, Path("out"), device="cuda:1"), MergeSummary)


def geometric(x: torch.Tensor, a: State) -> None:
    assert_type(pymerge.gram([x, x], x, per="row"), torch.Tensor)
    assert_type(pymerge.combine([x, x], [0.5, 0.5], x, backend="cpu"), torch.Tensor)
    assert_type(pymerge.slerp([x, x], t=0.5), torch.Tensor)
    assert_type(pymerge.nuslerp([a, a], a, weights=[1, 2], nuslerp_flatten=False), State)
    assert_type(pymerge.multislerp([x], x, normalize_weights=False, out=x), torch.Tensor)
    assert_type(pymerge.karcher([a, a], max_iter=3, tol=1e-4), State)
    assert_type(pymerge.model_stock([x, x], x, filter_wise=True, flavor="mergekit"), torch.Tensor)
    pymerge.merge([a, a], method="slerp", t=0.3)


def submodules(model: torch.nn.Module, x: torch.Tensor) -> None:
    assert_type(pymerge.compat.peft.ties([x, x], x, 0.5), torch.Tensor)
    assert_type(peft_ties([x, x], x, 0.5, "frequency"), torch.Tensor)
    with pymerge.compat.peft.patch():
        pass
    pymerge.compat.peft.unpatch()
    with pymerge.compat.mergekit.patch():
        pass
    pair = pymerge.compat.ties_merging.topk_values_mask(x, 20)
    assert_type(pair, tuple[torch.Tensor, torch.Tensor])
    three = pymerge.compat.ties_merging.topk_values_mask(x, 20, return_mask=True)
    assert_type(three, tuple[torch.Tensor, torch.Tensor, torch.Tensor])
    whole = pymerge.compat.ties_merging.merge_methods("nf", x, 0.9, "normfrac", "dis-max")
    assert_type(whole, torch.Tensor)
    pymerge.statistics.collect(model, [x], loss="causal-lm", kinds=["diagonal_fisher"])
    assert_type(pymerge.methods.find_method("ties").name, str)
    assert_type(pymerge.errors.MergeError("no").problems, tuple[str, ...])
    assert_type(pymerge.reference.ties.norm_factor(x, x > 0, "l2"), float)
    assert_type(pymerge.__version__, str)


def mistakes(x: torch.Tensor, a: State, model: torch.nn.Module) -> None:
    _ = pymerge.nope  # type: ignore[attr-defined]
    _ = pymerge.statistics.nope  # type: ignore[attr-defined]
    pymerge.ties([x], x, flavor="papers")  # type: ignore[arg-type]
    pymerge.ties([x], x, densty=0.2)  # type: ignore[call-arg]
    pymerge.ties([x], x, density="0.2")  # type: ignore[arg-type]
    pymerge.ties([x], x, trim="top")  # type: ignore[arg-type]
    pymerge.ties([x], x, backend="gpu")  # type: ignore[arg-type]
    pymerge.ties([x], a)  # type: ignore[type-var]
    pymerge.ties(model)  # type: ignore[arg-type]
    pymerge.ties([x], x, 0.2)  # type: ignore[call-arg]
    pymerge.select([x], x, flavor="papers")  # type: ignore[call-overload]
    pymerge.gram([x], per="rows")  # type: ignore[arg-type]
    pymerge.slerp([x, x])  # type: ignore[call-arg]
    pymerge.model_stock([x, x])  # type: ignore[call-arg]
    pymerge.merge([a], a, method="tise")  # type: ignore[arg-type]
    pymerge.merge([a], a, flavour="peft")  # type: ignore[call-arg]
    pymerge.merge([x], x)  # type: ignore[list-item, arg-type]
    pymerge.mats([x], [x], precision="fp16")  # type: ignore[arg-type]
    pymerge.mats([x], [x], init="mean")  # type: ignore[arg-type]
    pymerge.mats_many([], iteration=3)  # type: ignore[call-arg]
    pymerge.regmean([x], [x], task_weights="inverse")  # type: ignore[arg-type]
    pymerge.merge_checkpoints("recipe.yml")  # type: ignore[call-arg]
    pymerge.merge_checkpoints("recipe.yml", "out", thread=3)  # type: ignore[call-arg]
    pymerge.statistics.collect(model, [x], kinds=["fisher"])  # type: ignore[list-item]
    pymerge.compat.peft.prune(x, 0.5, "largest")  # type: ignore[arg-type]
