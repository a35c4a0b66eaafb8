"""The methods that are options of `ties`: fixed ones, and parameters that fill in the others."""

from __future__ import annotations

from typing import get_args

from pymerge.methods.method import REQUIRED, Method, Parameter
from pymerge.rules.types import Flavor


def _weight(scope: str) -> Parameter:
    return Parameter("weight", "number", scope, "weights", REQUIRED)


def _normalize(default: bool) -> Parameter:
    return Parameter("normalize", "flag", "shared", "merge", default)


def _task_vectors(
    name: str,
    title: str,
    url: str,
    *,
    trim: str,
    elect: str,
    normalize: bool = False,
    rescale: bool = False,
) -> Method:
    """A method on task vectors: trim, elect, merge, scale (docs/spec/ties.md)."""
    trims = trim != "none"
    parameters = [
        _weight("non_base"),
        Parameter("density", "number", "non_base", "density" if trims else "", 1.0, 0, 1),
        _normalize(normalize),
        Parameter("rescale", "flag", "shared", "rescale" if trims else "", rescale),
        Parameter("lambda", "number", "shared", "scaling", 1.0),
        Parameter(
            "int8_mask", "flag", "shared", "", False
        ),  # mergekit's storage of masks; here no mask is stored
    ]
    extra: tuple[Parameter, ...] = ()
    if name == "ties":
        extra = (Parameter("flavor", "choice", "shared", "flavor", "mergekit", choices=_FLAVORS),)
    if trim == "outliers":
        parameters.append(Parameter("gamma", "number", "non_base", "gamma", 0.01, 0, 1))
    if trim == "magprune":
        parameters.append(Parameter("epsilon", "number", "non_base", "epsilon", 0.15, 0, 1))
    fixed = {"trim": trim, "elect": elect} if trims else _PLAIN
    return Method(name, title, url, fixed, tuple(parameters), extra=extra)


_FLAVORS = get_args(Flavor)
_PLAIN = {"trim": "none", "elect": "none", "density": 1.0}
_DARE = "https://arxiv.org/abs/2311.03099"
_DELLA = "https://arxiv.org/abs/2406.11617"
_BREADCRUMBS = "https://arxiv.org/abs/2312.06795"

TASK_VECTORS = (
    Method(
        "linear",
        "Linear",
        "https://arxiv.org/abs/2203.05482",
        _PLAIN,
        (_weight("input"), _normalize(True)),
        takes_base=False,
        divides_by_weights=True,
    ),
    _task_vectors(
        "task_arithmetic",
        "Task Arithmetic",
        "https://arxiv.org/abs/2212.04089",
        trim="none",
        elect="none",
    ),
    _task_vectors(
        "ties",
        "TIES",
        "https://arxiv.org/abs/2306.01708",
        trim="magnitude",
        elect="sum",
        normalize=True,
    ),
    _task_vectors("dare_linear", "Linear DARE", _DARE, trim="random", elect="none", rescale=True),
    _task_vectors("dare_ties", "DARE TIES", _DARE, trim="random", elect="sum", rescale=True),
    _task_vectors("breadcrumbs", "Model Breadcrumbs", _BREADCRUMBS, trim="outliers", elect="none"),
    _task_vectors(
        "breadcrumbs_ties",
        "Model Breadcrumbs with TIES",
        _BREADCRUMBS,
        trim="outliers",
        elect="sum",
    ),
    _task_vectors(
        "della", "DELLA", _DELLA, trim="magprune", elect="sum", normalize=True, rescale=True
    ),
    _task_vectors(
        "della_linear", "Linear DELLA", _DELLA, trim="magprune", elect="none", rescale=True
    ),
    Method(
        "passthrough",
        "Passthrough",
        "",
        {**_PLAIN, "merge": "sum"},
        (Parameter("scale", "number", "input", "weights", None),),
        takes_base=False,
        max_models=1,
        copies=True,
    ),
)
