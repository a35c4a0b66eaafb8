"""What a plan says of models that do not fit together: a few names, a count, and what they have in
common.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

from pymerge.checkpoint.types import ModelHeader, TensorInfo
from pymerge.messages.words import names_with_verb
from pymerge.planning.missing_names import in_common
from pymerge.planning.plan import Plan
from pymerge.planning.planner import build_plan
from pymerge.recipe.resolve import read_recipe

Shapes = dict[str, tuple[int, ...]]


def llama(
    layers: int = 32, size: int = 64, prefix: str = "model.", norms: tuple[str, ...] = ()
) -> Shapes:
    found: Shapes = {f"{prefix}embed_tokens.weight": (100, size), f"{prefix}norm.weight": (size,)}
    found["lm_head.weight"] = (100, size)
    for i in range(layers):
        layer = f"{prefix}layers.{i}."
        found |= {f"{layer}self_attn.{q}_proj.weight": (size, size) for q in "qkvo"}
        found |= {f"{layer}mlp.{q}_proj.weight": (2 * size, size) for q in ("gate", "up")}
        found[f"{layer}mlp.down_proj.weight"] = (size, 2 * size)
        norms = ("input_layernorm", "post_attention_layernorm", *norms)
        found |= {f"{layer}{norm}.weight": (size,) for norm in dict.fromkeys(norms)}
    return found


def planned(*models: Shapes, dtypes: dict[int, str] | None = None, **more: Any) -> Plan:
    """Of the TIES merge of models/1, models/2 ... with the base models/0."""
    headers = []
    for k, shapes in enumerate(models):
        dtype = (dtypes or {}).get(k, "bfloat16")
        tensors = {name: TensorInfo(name, dtype, shape) for name, shape in shapes.items()}
        headers.append(ModelHeader(f"models/{k}", tensors, {"model_type": "llama"}))
    entries = [{"model": header.reference, "parameters": {"weight": 1.0}} for header in headers[1:]]
    recipe = {"merge_method": "ties", "base_model": "models/0", "models": entries, **more}
    return build_plan(read_recipe(recipe), headers)


def names_in(text: str) -> list[str]:
    return re.findall(r"[\w.]+\.(?:weight|bias)\b", text)


@pytest.mark.parametrize(
    ("models", "said"),
    [
        (
            (llama(), llama(prefix="", size=128)),
            [
                (
                    "models/1 lacks 290 tensors .* and 286 others; names differ by the prefix"
                    " 'model.': all of them begin with it, the names of models/1 do not; load"
                ),
                (
                    "models/1 has 290 tensors .*; names differ by the prefix 'model.': most names"
                    " of models/0 begin with it, these do not; load"
                ),
                "shapes differ in 1 tensor",
            ],
        ),
        (
            (llama(), llama(prefix="language_model.model.", size=128), llama()),
            [
                "names differ by the prefix 'language_model.': most names of models/1 begin with",
                "names differ by the prefix 'language_model.': all of them begin with it, the",
                "shapes differ in 1 tensor",
            ],
        ),
        ((llama(), llama(24)), ["lacks 72 tensors .* others; these are layers 24 to 31; merge"]),
        (
            (llama(24), llama()),
            ["has 72 tensors that models/0 lacks: .*these are layers 24 to 31;"],
        ),
        (
            (llama(), llama(norms=("self_attn.q_norm", "self_attn.k_norm"))),
            [
                "these are self_attn.q_norm.weight and self_attn.k_norm.weight of layers 0 to 31;"
                " merge"
            ],
        ),
        (
            (llama(), llama(size=128)),
            [r"shapes differ in 291 tensors: .* and 287 others; merge models of one size"],
        ),
    ],
)
def test_a_large_model_gets_a_short_message(models, said):
    problems = planned(*models).problems
    assert len(problems) == len(said)
    for problem, pattern in zip(problems, said, strict=True):
        assert re.search(pattern, problem), problem
        named = names_in(problem.partition("; these are")[0])
        assert len(named) <= 4 and len(set(named)) == len(named)
        assert len(problem) < 600


def test_one_tensor_is_singular():
    base, lacking, name = llama(2), llama(2), "model.layers.1.mlp.up_proj.weight"
    del lacking[name]
    (problem,) = planned(base, lacking).problems
    assert f"lacks 1 tensor that the merge needs (as models/0 has it): {name}; these" in problem
    (problem,) = planned(lacking, base).problems
    assert f"has 1 tensor that models/0 lacks: {name}; these are in layer 1; merge" in problem
    (problem,) = planned(base, base | {"model.norm.weight": (3,)}).problems
    assert "shapes differ in 1 tensor: model.norm.weight is [64] in" in problem


def test_dtypes_and_notes_name_a_few():
    (problem,) = planned(llama(), llama(), dtypes={1: "float8_e4m3fn"}).problems
    assert len(names_in(problem)) == 4 and "and 287 others are bfloat16 in" in problem
    constants = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": (8,) for i in range(32)}
    for models in ((llama(), llama() | constants), (llama() | constants, llama())):
        (note,) = planned(*models).notes
        assert note.count("inv_freq") == 4 and "and 28 others" in note


def test_a_recipe_that_lacks_values_names_a_few():
    weight = [{"filter": "self_attn", "value": 1.0}]
    with pytest.raises(
        ValueError, match=r"has no value for models/1 in .* and 159 others: no"
    ) as error:
        planned(llama(), llama(), models=[{"model": "models/1", "parameters": {"weight": weight}}])  # fmt: skip
    assert len(names_in(str(error.value))) == 4


@pytest.mark.parametrize(
    ("names", "ours", "theirs", "said"),
    [
        (["a.weight"], ["a.weight", "b"], ["b"], "; merge"),
        (["h.3.w", "h.5.w"], [f"h.{i}.w" for i in range(9)], ["h.0.w", "h.1.w"], "layers 3, 5; "),
        (["h.3.a", "h.3.b"], ["h.3.a", "h.3.b", "h.0.a"], ["h.0.a"], "; these are layer 3; "),
        (
            ["h.3.a", "h.3.b", "norm"],
            ["h.3.a", "h.3.b", "h.0.a", "norm"],
            ["h.0.a"],
            "; 2 of them are layer 3; ",
        ),
        (["h.3.a"], ["h.3.a", "h.3.b"], ["h.3.b"], "; these are in layer 3; "),
    ],
)
def test_what_names_have_in_common(names, ours, theirs, said):
    assert said in in_common(names, ours, theirs, "B")


def test_a_list_has_its_verb():
    assert names_with_verb(["a", "a"]) == "a is"
    assert names_with_verb(list("abcdef"), "was", "were") == "a, b, c, d and 2 others were"
