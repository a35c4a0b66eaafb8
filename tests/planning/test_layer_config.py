"""What slices make of the entries of a config that speak of layers."""

from __future__ import annotations

import re
from typing import Any

import pytest

from pymerge.planning.layer_config import carry_layers
from pymerge.recipe.layers import Origin

STACKED = (0, 1, 2, 1, 2, 3)  # [0, 3) and [1, 4)


def carried(
    config: dict[str, Any], layers: tuple[int, ...] = STACKED, others: Any = ()
) -> tuple[dict[str, Any], list[str]]:
    """Of one model, or with `others`, of one layer of each model in turn."""
    configs = [config, *others]
    origins = [Origin(i % len(configs), layer) for i, layer in enumerate(layers)]
    return carry_layers(configs, 0, origins)


@pytest.mark.parametrize(
    ("entries", "wanted"),
    [
        # An entry a layer.
        ({"no_rope_layers": [1, 1, 1, 0]}, {"no_rope_layers": [1, 1, 1, 1, 1, 0]}),
        ({"layer_types": list("abcd")}, {"layer_types": list("abcbcd")}),
        ({"mlp_layer_types": list("abcd")}, {"mlp_layer_types": list("abcbcd")}),
        ({"attention_layers": list("glgl")}, {"attention_layers": list("glglgl")}),
        ({"num_key_value_heads": [1, 2, 3, 3]}, {"num_key_value_heads": [1, 2, 3, 2, 3, 3]}),
        ({"block_configs": [{"a": i} for i in range(4)]}, {"block_configs": [{"a": i} for i in STACKED]}),
        ({"hybrid_override_pattern": "M-M*"}, {"hybrid_override_pattern": "M-M-M*"}),
        ({"moe_layer_freq": [0, 1, 1, 0]}, {"moe_layer_freq": [0, 1, 1, 1, 1, 0]}),
        # Layer numbers.
        ({"mlp_only_layers": [1]}, {"mlp_only_layers": [1, 3]}),
        ({"mlp_only_layers": []}, {"mlp_only_layers": []}),
        ({"mlp_only_layers": [0, 1, 2, 3]}, {"mlp_only_layers": [0, 1, 2, 3, 4, 5]}),
        ({"cross_attention_layers": [0, 3]}, {"cross_attention_layers": [0, 5]}),
        ({"full_attn_idxs": [2]}, {"full_attn_idxs": [2, 4]}),
        ({"moe_layers_enum": "1,2"}, {"moe_layers_enum": "1,2,3,4"}),
        ({"layer_overrides": {"2": {"x": 1}}}, {"layer_overrides": {"2": {"x": 1}, "4": {"x": 1}}}),
        ({"per_layer_config": {"02": {"x": 1}, "03": {}}}, {"per_layer_config": {"02": {"x": 1}, "04": {"x": 1}, "05": {}}}),
        # A pattern that repeats.
        ({"attention_types": [[["global", "local"], 2]]}, {"attention_types": [[["global", "local", "global", "local", "global", "local"], 1]]}),
        ({"block_types": ["r", "r", "a"]}, {"block_types": ["r", "r", "a", "r", "a", "r"]}),
        ({"sliding_window_pattern": "LLG"}, {"sliding_window_pattern": "LLGLGL"}),
        # A rule, said otherwise.
        ({"sliding_window_pattern": 3}, {"layer_types": [f"{k}_attention" for k in ("sliding", "sliding", "full", "sliding", "full", "sliding")]}),
        ({"model_type": "gemma2"}, {}),
        ({"first_k_dense_replace": 1}, {}),
        ({"first_k_dense_replace": 4}, {"first_k_dense_replace": 6}),
        ({"decoder_sparse_step": 2}, {}),
        ({"decoder_sparse_step": 3}, {"decoder_sparse_step": 1, "mlp_only_layers": [0, 1, 3, 5]}),
        ({"decoder_sparse_step": 1, "mlp_only_layers": [1]}, {"mlp_only_layers": [1, 3]}),
        ({"max_window_layers": 2, "use_sliding_window": False}, {}),
        ({"no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0]}, {"no_rope_layers": [1, 1, 1, 1, 1, 0]}),
        ({"interleave_moe_layer_step": 2, "moe_layers": [1, 3]}, {"moe_layers": [1, 3, 5]}),
        ({"num_kv_shared_layers": 0}, {}),
        # What has a layer's name and says nothing of one; lists of other meaning.
        ({"layer_norm_eps": 1e-5, "layerdrop": 0.0, "num_nextn_predict_layers": 1, "hidden_size_per_layer_input": 0}, {}),
        ({"eos_token_id": [1, 2, 3, 4], "architectures": ["A"], "suppress_tokens": [1, 2, 3, 4]}, {}),
        ({"rope_scaling": {"long_factor": [1.0] * 4}, "ssm_multipliers": [1.0] * 4}, {}),
    ],
)  # fmt: skip
def test_entries_follow_their_layers(entries: dict[str, Any], wanted: dict[str, Any]):
    config = {"num_hidden_layers": 4, **entries}
    changed, problems = carried(config)
    assert not problems
    assert changed.pop("num_hidden_layers") == 6
    assert {key: value for key, value in changed.items() if config.get(key) != value} == {
        key: value for key, value in wanted.items() if config.get(key) != value
    }


@pytest.mark.parametrize(
    ("entries", "layers", "wanted"),
    [
        ({"first_k_dense_replace": 2}, (1, 2, 3), {"first_k_dense_replace": 1}),
        ({"max_window_layers": 2, "use_sliding_window": True}, (2, 3), {"max_window_layers": 0}),
        ({"num_kv_shared_layers": 2}, (0, 1, 3), {"num_kv_shared_layers": 1}),
        ({"global_attn_every_n_layers": 2}, (0, 2, 3, 1), {"layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2}),
        ({"no_rope_layer_interval": 2}, (0, 2, 3), {"no_rope_layers": [1, 1, 0]}),
        ({"full_attention_interval": 4}, (3, 0), {"layer_types": ["full_attention", "linear_attention"]}),
        ({"attn_layer_period": 2, "attn_layer_offset": 1}, (2, 3), {}),
        ({"what_layers": 7}, (0, 1), {}),
    ],
)  # fmt: skip
def test_rules_of_other_slices(entries: dict[str, Any], layers: tuple[int, ...], wanted: Any):
    changed, problems = carried({"num_hidden_layers": 4, **entries}, layers)
    assert not problems
    assert changed == {"num_hidden_layers": len(layers), **wanted}


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"first_k_dense_replace": 2}, "first_k_dense_replace .* layer 3 .* was layer 1"),
        ({"attn_layer_period": 4, "attn_layer_offset": 1}, "attn_layer_period"),
        ({"moe_layer_freq": 3}, "moe_layer_freq"),
        ({"moe_layer_start_index": 1, "moe_layer_end_index": 2}, "moe_layer_start_index"),
        ({"num_kv_shared_layers": 2}, "num_kv_shared_layers"),
        ({"hidden_size_per_layer_input": 8}, r"hidden_size_per_layer_input of its config has one"),
        ({"num_mem_blocks": 2}, r"num_mem_blocks of its config has layers share the weights"),
        ({"what_layers": 7}, r"what_layers of its config \(7\) speaks of layers in a way that is"),
        ({"special_layers": {"a": 1}}, "special_layers"),
        ({"layer_plan": ["a", "b", "c"]}, "layer_plan"),
        # What no library writes.
        (
            {"layer_map": {"²": 1}},
            "layer_map of its config, or of another model's, is nothing that",
        ),
        (
            {"attention_types": [[["global"], 1 << 50]]},
            "attention_types of its config has an entry",
        ),
        (
            {"attention_types": [[["global"], 1 << 50], [["local"], 4 - (1 << 50)]]},
            "attention_types of its config has an entry a layer, and none for layer",
        ),
        ({"decoder_sparse_step": 2, "mlp_only_layers": 3}, "mlp_only_layers|decoder_sparse_step"),
        ({"decoder_sparse_step": 2, "mlp_only_layers": "x"}, "decoder_sparse_step"),
    ],
)
def test_what_cannot_be_carried_is_a_problem(entries: dict[str, Any], said: str):
    _, problems = carried({"num_hidden_layers": 4, **entries})
    assert re.search(said, problems[-1]), problems


@pytest.mark.parametrize("theirs", [[[]], [None], "x", 3, {"a": 1}])
@pytest.mark.parametrize("key", ["block_types", "sliding_window_pattern", "moe_layer_ids"])
def test_another_models_config_of_other_kinds_is_a_problem(key: str, theirs: Any):
    main = {"num_hidden_layers": 4, key: "1,2" if key == "moe_layer_ids" else "LLG"}
    other = {"num_hidden_layers": 4, key: theirs}
    _, problems = carry_layers([main, other], 0, [Origin(0, 0), Origin(1, 1)])
    assert all(problem.startswith(f"{key} of its config") for problem in problems)


def test_a_config_without_a_number_of_layers_is_a_problem():
    _, (problem,) = carried({"model_type": "vit", "depth": 4})
    assert "num_hidden_layers" in problem
    assert carried({}) == ({}, [])


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "num_transformer_layers"])
@pytest.mark.parametrize("nested", [True, False])
def test_every_name_of_the_number_of_layers_in_every_place(key: str, nested: bool):
    text = {key: 4, "layer_types": list("abcd"), "x": 1}
    vision = {"num_hidden_layers": 2, "layer_types": ["a", "b"]}
    config = {"text_config": text, "vision_config": vision} if nested else text
    changed, problems = carried(config)
    assert not problems
    wanted = {key: 6, "layer_types": list("abcbcd")}
    assert changed == ({"text_config": {**text, **wanted}} if nested else wanted)


def test_entries_come_from_the_model_of_their_layer():
    one = {"num_hidden_layers": 2, "layer_types": ["a", "b"], "mlp_only_layers": [0]}
    two = {"num_hidden_layers": 3, "layer_types": ["c", "d", "e"], "mlp_only_layers": [1, 2]}
    changed, problems = carried(one, (0, 2, 1, 0), [two])
    assert not problems
    assert changed == {
        "num_hidden_layers": 4,
        "layer_types": ["a", "e", "b", "c"],
        "mlp_only_layers": [0, 1],
    }
    _, (problem,) = carried(one, (0, 0), [{"num_hidden_layers": 2, "mlp_only_layers": [1]}])
    assert "layer_types" in problem
    _, (problem,) = carried({"num_hidden_layers": 2}, (0, 0, 0, 1), [two])
    assert "layer_types of its config is not there" in problem
    # A model without a config is taken to have that of the result.
    assert carried(one, (0, 1), [{}])[0]["layer_types"] == ["a", "b"]


TRANSFORMERS = [
    ("smollm3", {"no_rope_layer_interval": 3}, ("no_rope_layers", "layer_types")),
    ("gemma2", {}, ("layer_types",)),
    ("gemma3_text", {"sliding_window_pattern": 2}, ("layer_types",)),
    ("cohere2", {"sliding_window_pattern": 3}, ("layer_types",)),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}, ("layer_types",)),
    ("qwen3_next", {"full_attention_interval": 2}, ("layer_types",)),
    ("modernbert", {"global_attn_every_n_layers": 3}, ("layer_types",)),
    ("gpt_neo", {"attention_types": [[["global", "local"], 3]]}, ("attention_layers",)),
    ("llama4_text", {"interleave_moe_layer_step": 2}, ("moe_layers", "no_rope_layers")),
    ("gpt_oss", {}, ("layer_types",)),
    ("lfm2", {"layer_types": ["conv", "full_attention"] * 3}, ("layer_types",)),
]


@pytest.mark.parametrize("written", ["as given", "as saved"])
@pytest.mark.parametrize(("kind", "options", "keys"), TRANSFORMERS)
def test_transformers_sees_every_layer_as_it_was(
    kind: str, options: dict[str, Any], keys: tuple[str, ...], written: str
):
    """Both in configs that say the rule, as older releases wrote, and in those that say all."""
    from transformers import AutoConfig

    count = {"gpt_neo": "num_layers"}.get(kind, "num_hidden_layers")
    before = AutoConfig.for_model(kind, **{count: 6}, **options)
    config = {"model_type": kind, count: 6, **options}
    if written == "as saved":
        config = before.to_diff_dict() | {count: 6}
    layers = (0, 1, 2, 1, 2, 3, 5)
    changed, problems = carried(config, layers)
    assert not problems
    new = {key: value for key, value in {**config, **changed}.items() if key != "model_type"}
    after = AutoConfig.for_model(kind, **new)
    for key in keys:
        old, now = getattr(before, key), getattr(after, key)
        if key == "moe_layers":
            assert now == [i for i, layer in enumerate(layers) if layer in old]
        else:
            assert now == [old[layer] for layer in layers]


def test_two_counts_of_layers() -> None:
    """CLAP counts those of both towers at the top, BridgeTower those that lie above them."""
    changed, problems = carried({"num_hidden_layers": 8, "text_config": {"num_hidden_layers": 4}})
    assert not changed and "counts 8 layers, its text_config 4" in problems[0]
    same = {"num_hidden_layers": 4, "text_config": {"num_hidden_layers": 4}}
    changed, problems = carried(same)
    assert not problems and changed["text_config"]["num_hidden_layers"] == 6
