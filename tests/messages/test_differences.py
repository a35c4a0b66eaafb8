"""Errors about state dicts whose names or shapes differ: short and telling, however many names
there are.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

import pymerge
from pymerge.compat import mergekit

PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm",
         "post_attention_layernorm", "other")  # fmt: skip
NAMES = [f"layers.{i}.{part}.weight" for i in range(33) for part in PARTS]
ONE = torch.ones(1)


def state(names: Iterable[str]) -> dict[str, torch.Tensor]:
    return dict.fromkeys(names, ONE)


def said(models: list[dict[str, torch.Tensor]], base: dict[str, torch.Tensor] | None) -> str:
    """What the ops say of them; a merge, where its plan has no way."""
    with pytest.raises(ValueError, match="the state dicts do not match") as caught:
        pymerge.ties(models, base)
    message = str(caught.value)
    for call in (
        lambda: pymerge.select(models, base),
        lambda: pymerge.merge_with_statistics(models, base, [], "mats"),
    ):
        with pytest.raises(ValueError) as other:
            call()
        assert str(other.value) == message
    assert len(message) < 1500
    return message


def refused(models: list[dict[str, torch.Tensor]], base: dict[str, torch.Tensor] | None) -> str:
    """What a merge says too."""
    message = said(models, base)
    with pytest.raises(ValueError) as caught:
        pymerge.merge(models, base, method="linear" if base is None else "ties")
    assert str(caught.value) == message
    return message


def test_a_prefix_is_the_difference():
    model = state(["model." + name for name in NAMES])
    message = said([model] * 2, state(NAMES))
    assert (
        "330 names of models[0], models[1] and base differ by the prefix 'model.': those of"
        " models[0], models[1] begin with it, those of base do not; take it off" in message
    )
    assert "name.removeprefix('model.')" in message and message.count("layers.") == 0
    with pytest.warns(UserWarning, match="they are matched without the prefix 'model.'"):
        pymerge.merge([model] * 2, state(NAMES))
    # The advice can be followed.
    bare = {name.removeprefix("model."): x for name, x in model.items()}
    pymerge.merge([bare] * 2, state(NAMES))


def test_the_base_has_the_prefix():
    message = said([state(NAMES)], state(["module." + name for name in NAMES]))
    assert (
        "330 names of models[0] and base differ by the prefix 'module.': those of base" in message
    )


def test_another_prefix_and_a_head():
    models = [state([*("transformer." + n for n in NAMES), "score.weight"])]
    message = said(models, state([*("model." + n for n in NAMES), "lm_head.weight"]))
    assert "by the prefix: those of models[0] begin with 'transformer.'" in message
    assert "those of base with 'model.'; give all the same one" in message
    assert "models[0] lacks lm_head.weight\n" in message
    assert "models[0] has score.weight, which base lacks\n" in message
    assert message.endswith("leave out of each what another lacks")


def test_many_names_are_counted_and_said_once():
    vision = [f"visual.blocks.{name}" for name in NAMES]
    message = refused([state([*NAMES, *vision])] * 3, state(NAMES))
    first = ", ".join(vision[:4])
    who = "models[0], models[1], models[2]"
    assert (
        f"{who} have 330 names that base lacks: {first} and 326 others (all begin with"
        " 'visual.blocks.layers.')" in message
    )
    message = refused([state(NAMES), state(NAMES[:10])], None)
    assert (
        "models[1] lacks 320 of models[0]'s 330 names: layers.1.self_attn.q_proj.weight, "
        in message
    )
    assert message.count(NAMES[10]) == 1


def test_every_model_differs_in_another_way():
    models = [state([name for name in NAMES if f".{i}." not in name]) for i in range(30)]
    message = refused(models, state(NAMES))
    assert "models[3] lacks 10 of base's 330 names" in message
    assert "models[4]" not in message and "and 26 more of the kind" in message


def test_many_shapes():
    message = refused([{name: torch.ones(2) for name in NAMES}], state(NAMES))
    assert "layers.0.self_attn.q_proj.weight has shape (2,) in models[0], (1,) in base" in message
    assert "326 more have other shapes in models[0] than in base" in message


def test_out_lacks_many():
    with pytest.raises(ValueError, match=r"out lacks .* and 326 others; pass a tensor") as caught:
        pymerge.ties([state(NAMES)], out={})
    assert len(str(caught.value)) < 300


def test_the_drop_in_names_its_models_and_a_few_of_many():
    models = {f"m{i}": state(NAMES) for i in range(300)}
    parameters = {"weight": 1.0}
    with pytest.raises(ValueError, match=r"there are 'm0', 'm1', 'm2', 'm3' and 296 others"):
        mergekit.merge_state_dicts(models, "ties", base="base", parameters=parameters)
    models["m7"] = state(["x." + name for name in NAMES])
    with pytest.raises(
        ValueError,
        match=r"330 names of models\['m7'\] and models\['m0'\] differ by the prefix 'x.'",
    ):
        mergekit.merge_state_dicts(models, "ties", base="m0", parameters=parameters)
