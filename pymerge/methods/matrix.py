"""The methods that take task vectors of linear layers as matrices (docs/spec/matrix.md)."""

from __future__ import annotations

from pymerge.methods.method import Given, Method, Parameter
from pymerge.rules.matrix import DAMPING, ITERATIONS, MatrixOptions
from pymerge.rules.options import OpOptions

_SCALING = Parameter("lambda", "number", "shared", "scaling", 1.0)


def _method(name: str, title: str, url: str, *parameters: Parameter) -> Method:
    def make(given: Given) -> OpOptions:
        values = {each.option: given.shared[each.name] for each in parameters}
        if "iterations" in values:
            values["iterations"] = round(values["iterations"])
        scaling, count = given.shared["lambda"], len(given.per_model)
        return MatrixOptions(name, count, scaling, non_finite=given.non_finite, **values)

    return Method(
        name, title, url, {}, (*parameters, _SCALING), op="matrix", make=make, min_models=1
    )


MATRIX = (
    _method(
        "wudi",
        "WUDI",
        "https://arxiv.org/abs/2503.08099",
        Parameter("iterations", "integer", "shared", "iterations", ITERATIONS, 0),
        Parameter("damping", "number", "shared", "damping", DAMPING, 0),
    ),
    _method("tsv", "TSV-Merge", "https://arxiv.org/abs/2412.00081"),
    _method("iso_c", "Iso-C", "https://arxiv.org/abs/2502.04959"),
)
