"""The methods of task vectors under masks (docs/spec/masked.md)."""

from __future__ import annotations

from pymerge.methods.method import REQUIRED, Given, Method, Parameter
from pymerge.rules.masked import FLAVORS, PARAMETERS, resolve_masked
from pymerge.rules.options import OpOptions


def _method(
    name: str,
    title: str,
    url: str,
    parameters: tuple[Parameter, ...],
    models: int | None = None,
    flavors: bool = False,
) -> Method:
    """models: exactly so many; None for any number from 1 on. flavors: whether Python's numbers
    differ from mergekit's.
    """

    def make(given: Given) -> OpOptions:
        values = {key: given.shared[key] for key in PARAMETERS[name] if key != "flavor"}
        if flavors:
            default = "mergekit" if given.recipe else "paper"
            values["flavor"] = given.shared.get("flavor") or default
        return resolve_masked(name, len(given.per_model), non_finite=given.non_finite, **values)

    return Method(
        name,
        title,
        url,
        {},
        parameters,
        op="masked",
        make=make,
        min_models=models or 0,
        max_models=models,
        extra=(Parameter("flavor", "choice", "shared", "flavor", None, choices=FLAVORS),)
        if flavors
        else (),
    )


_EPSILON = Parameter("epsilon", "number", "shared", "epsilon", 1e-5, 0)
_RAM = "https://arxiv.org/abs/2601.13572"

MASKED = (
    _method(
        "nearswap",
        "NearSwap",
        "https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
        (Parameter("t", "number", "shared", "t", REQUIRED),),
        models=1,
    ),
    _method("ram", "Reinforced Agent Merging", _RAM, (_EPSILON,)),
    _method(
        "ramplus_tl",
        "Reinforced Agent Merging Plus (Tensor-Local)",
        _RAM,
        (
            Parameter("r", "number", "shared", "r", 0.1),
            Parameter("alpha", "number", "shared", "alpha", 0.2, 0),
            _EPSILON,
        ),
    ),
    _method(
        "sce",
        "SCE",
        "https://arxiv.org/abs/2408.07990",
        (
            # mergekit's storage of masks; here no mask is stored
            Parameter("int8_mask", "flag", "shared", "", False),
            Parameter("select_topk", "number", "shared", "select_topk", 1.0, 0, 1),
        ),
        flavors=True,
    ),
    _method(
        "arcee_fusion",
        "Arcee Fusion",
        "https://arcee.ai",
        (),
        models=1,
        flavors=True,
    ),
)
