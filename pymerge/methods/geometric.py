"""The methods that combine whole tensors, rows or columns with coefficients that follow from their
Gram matrix (docs/spec/gram.md, G6 to G10).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pymerge.methods.method import REQUIRED, Given, Method, Parameter
from pymerge.rules.gram import GramOptions
from pymerge.rules.options import OpOptions

_FLAVORS = ("mergekit", "paper")
# None: mergekit's numbers in recipes and in `compat.mergekit`, the mended ones in Python.
_FLAVOR = Parameter("flavor", "choice", "shared", "flavor", None, choices=_FLAVORS)
_WEIGHT = Parameter("weight", "number", "non_base", "weights", REQUIRED)

Values = Callable[[Given], tuple[str, dict[str, Any]]]


def _method(
    name: str,
    title: str,
    url: str,
    parameters: Sequence[Parameter],
    values: Values,
    mended: bool = False,
    **inputs: Any,
) -> Method:
    """values: gives what the coefficients are found per, and the parameters that they take.
    mended: whether some cases have other numbers than mergekit's.
    """

    def make(given: Given) -> OpOptions:
        per, found = values(given)
        flavor = given.shared.get("flavor")
        as_mergekit = mended and (given.recipe if flavor is None else flavor == "mergekit")
        return GramOptions(
            name, len(given.per_model), per, tuple(found.items()), as_mergekit, given.non_finite
        )

    extra = (_FLAVOR,) if mended else ()
    return Method(
        name, title, url, {}, tuple(parameters), op="gram", make=make, extra=extra, **inputs
    )


def _weights(given: Given) -> tuple[float, ...]:
    return tuple(float(values["weight"]) for values in given.per_model)


def _slerp(given: Given) -> tuple[str, dict[str, Any]]:
    return "tensor", {"t": float(given.shared["t"])}


def _nuslerp(given: Given) -> tuple[str, dict[str, Any]]:
    per = "column" if given.shared["nuslerp_row_wise"] else "row"
    return "tensor" if given.shared["nuslerp_flatten"] else per, {"weights": _weights(given)}


def _multislerp(given: Given) -> tuple[str, dict[str, Any]]:
    weights, normalize = _weights(given), bool(given.shared["normalize_weights"])
    if normalize and abs(sum(weights)) < 1e-8:
        raise ValueError(
            "the weights of multislerp sum to 0, so they cannot be normalized; change a weight, or"
            " set normalize_weights to false"
        )
    values = {"weights": weights, "normalize_weights": normalize, "eps": given.shared["eps"]}
    return "tensor", values


def _karcher(given: Given) -> tuple[str, dict[str, Any]]:
    return "tensor", {"max_iter": int(given.shared["max_iter"]), "tol": given.shared["tol"]}


def _model_stock(given: Given) -> tuple[str, dict[str, Any]]:
    return "row" if given.shared["filter_wise"] else "tensor", {}


GEOMETRIC = (
    _method(
        "slerp",
        "SLERP",
        "https://en.wikipedia.org/wiki/Slerp",
        [Parameter("t", "number", "shared", "t", REQUIRED)],
        _slerp,
        mended=True,
        takes_base=False,
        base_first=True,
        min_models=2,
        max_models=2,
    ),
    _method(
        "nuslerp",
        "NuSLERP",
        "https://en.wikipedia.org/wiki/Slerp",
        [
            _WEIGHT,
            Parameter("nuslerp_row_wise", "flag", "shared", "nuslerp_row_wise", False),
            Parameter("nuslerp_flatten", "flag", "shared", "nuslerp_flatten", True),
        ],
        _nuslerp,
        mended=True,
        base_optional=True,
        min_models=2,
        max_models=2,
    ),
    _method(
        "multislerp",
        "Multi-SLERP",
        "https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
        [
            _WEIGHT,
            Parameter("normalize_weights", "flag", "shared", "normalize_weights", True),
            Parameter("eps", "number", "shared", "eps", 1e-8, 0),
        ],
        _multislerp,
        base_optional=True,
        min_models=1,
    ),
    _method(
        "karcher",
        "Karcher mean",
        "https://arxiv.org/abs/2603.04972",
        [
            Parameter("max_iter", "integer", "shared", "max_iter", 10, 0),
            Parameter("tol", "number", "shared", "tol", 1e-5, 0),
        ],
        _karcher,
        takes_base=False,
        min_models=1,
    ),
    _method(
        "model_stock",
        "Model Stock",
        "https://arxiv.org/abs/2403.19522",
        [Parameter("filter_wise", "flag", "shared", "filter_wise", False)],
        _model_stock,
        mended=True,
        min_models=2,
    ),
)
