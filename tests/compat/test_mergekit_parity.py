"""Against the installed mergekit and peft: the same recipe, the same numbers (pytest -m parity)."""

from __future__ import annotations

import importlib.resources
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import pymerge
from pymerge.compat import mergekit as compat
from pymerge.compat import peft as compat_peft
from pymerge.methods import METHODS, REQUIRED
from pymerge.methods._settings import parse_setting
from pymerge.recipe.layers import Layers, comes_first

pytestmark = pytest.mark.parity

pytest.importorskip("mergekit", reason="mergekit is not installed")
pytest.importorskip("peft", reason="peft is not installed")

ULP = 2.0**-23
# mergekit has no such methods.
OURS = {"mats", "regmean", "fisher", "wudi", "tsv", "iso_c"}


def close(result, expected, ulps, scale):
    """Within so many units in the last place of the largest input of each element."""
    assert sorted(result) == sorted(expected)
    for name, tensor in expected.items():
        assert result[name].dtype == tensor.dtype
        error = (result[name] - tensor).abs()
        assert (error <= ulps * ULP * scale[name]).all(), (
            name,
            (error / (ULP * scale[name])).max(),
        )


# The table


def test_every_method_of_mergekit_is_named():
    from mergekit.merge_methods import registered_methods

    assert {m.spec.name for m in registered_methods()} == set(METHODS) - OURS


@pytest.mark.parametrize("name", [name for name in METHODS if name not in OURS])
def test_parameters_and_defaults(name):
    from mergekit import merge_methods
    from mergekit.merge_methods.base import MISSING

    theirs = {
        p.name: (p.scope.value, REQUIRED if p.default is MISSING else p.default)
        for p in merge_methods.get(name).spec.parameters
    }
    assert {p.name: (p.scope, p.default) for p in METHODS[name].parameters} == theirs


NUMBERS = st.one_of(
    st.floats(0, 1, allow_subnormal=False), st.integers(0, 1), st.sampled_from(["1e-1", "0.5", "1"])
)
FLAGS = st.one_of(st.booleans(), st.sampled_from(["true", "off", "y", 1, 0]))


def raw_settings(scalars):
    plain = st.one_of(scalars, st.lists(scalars, min_size=1, max_size=5))
    filters = st.one_of(st.none(), st.sampled_from(["*", "mlp", "attn", "layers.1", ""]))
    case = st.fixed_dictionaries({"value": plain}, optional={"filter": filters})
    return st.one_of(plain, case, st.lists(case, min_size=1, max_size=4))


def evaluated(raw, parameter_name, tensor, t):
    from mergekit.config import MergeConfiguration, evaluate_setting
    from mergekit.merge_methods import get

    config = MergeConfiguration.model_validate(
        {"merge_method": "ties", "models": [{"model": "x"}], "parameters": {"p": raw}}
    )
    spec = next(p for p in get("ties").spec.parameters if p.name == parameter_name)
    return evaluate_setting(tensor, config.parameters["p"], t, validate=spec.validate)


@settings(max_examples=300, deadline=None)
@given(
    raw_settings(NUMBERS), st.sampled_from(["layers.1.mlp.w", "layers.2.attn.w"]), st.integers(0, 6)
)
def test_numbers_evaluate_alike(raw, tensor, i):
    ours = parse_setting(METHODS["ties"].parameter("density"), raw).value(tensor, i / 6)
    assert ours == evaluated(raw, "density", tensor, i / 6)


@settings(max_examples=200, deadline=None)
@given(
    raw_settings(FLAGS), st.sampled_from(["layers.1.mlp.w", "layers.2.attn.w"]), st.integers(0, 6)
)
def test_flags_evaluate_alike(raw, tensor, i):
    ours = parse_setting(METHODS["ties"].parameter("normalize"), raw).value(tensor, i / 6)
    assert ours is evaluated(raw, "normalize", tensor, i / 6)


# Layers: mergekit has a list of architectures, we have rules over names.


def architectures():
    """(file, pre names, layer templates, post names) of the architectures that are one language
    model.
    """
    folder = importlib.resources.files("mergekit._data.architectures")
    for entry in sorted(folder.iterdir(), key=lambda item: item.name):
        if not entry.name.endswith(".json"):
            continue
        data = json.loads(entry.read_text())
        if data.get("kind", "module") == "module":
            names = [
                [w["name"] for w in part]
                for part in (
                    data["pre_weights"],
                    data["layer_templates"]["weights"],
                    data["post_weights"],
                )
            ]
            yield pytest.param(*names, id=entry.name)


@pytest.mark.parametrize(("before", "templates", "after"), list(architectures()))
def test_layers_of_known_architectures(before, templates, after):
    count = 3

    def filled(names, **values):
        for key, value in values.items():
            names = [name.replace("${" + key + "}", str(value)) for name in names]
        return names

    before, after = filled(before, num_layers=count), filled(after, num_layers=count)
    if any(name.startswith("layers.") for name in (*before, *after)):
        pytest.skip("phi-1 numbers its embedding and its head as layers")
    blocks = [filled(templates, layer_index=i) for i in range(count)]
    layers = Layers([*before, *(name for block in blocks for name in block), *after])
    assert layers.counts[layers.only_stack("m")] == count
    for i, block in enumerate(blocks):
        assert {layers.place(name).index for name in block} == {i}
    assert [name for name in (*before, *after) if layers.place(name) is not None] == []
    assert [name for name in before if not comes_first(name)] == []
    assert [name for name in after if comes_first(name)] == []


# State dicts


def family(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"w": (33, 65), "b": (77,)}
    base = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    models = [
        {n: base[n] + 0.1 * torch.randn(s, generator=generator) for n, s in shapes.items()}
        for _ in range(count)
    ]
    scale = {n: torch.stack([base[n].abs(), *(m[n].abs() for m in models)]).amax(0) for n in shapes}
    return base, models, scale


@pytest.mark.parametrize(
    ("method", "parameters", "ulps"),
    [
        ("linear", {"weight": [0.2, 0.5, 0.3, 0.1]}, 2),
        ("linear", {"weight": [0.2, 0.5, -0.3, 0.1], "normalize": False}, 2),
        ("task_arithmetic", {"weight": [0.5, 0.3, 0.7], "lambda": 0.7}, 0),
        ("task_arithmetic", {"weight": [0.5, 0.3, 0.7], "normalize": True}, 0),
        ("ties", {"weight": [0.5, 0.3, 0.7], "density": [0.2, 0.5, 1.0]}, 0),
        ("ties", {"weight": [0.5, -0.3, 0.7], "density": 0.3, "normalize": False}, 0),
        ("ties", {"weight": 1.0, "density": [0.0, 0.001, 0.4], "int8_mask": True}, 0),
        ("ties", {"weight": 1.0, "density": 0.4, "rescale": True}, 8),
        ("breadcrumbs", {"weight": 1.0, "density": [0.4, 0.99, 1.0], "gamma": 0.1}, 0),
        (
            "breadcrumbs_ties",
            {"weight": [0.5, 0.3, 0.7], "density": 0.4, "gamma": [0, 0.1, 0.5]},
            0,
        ),
        ("breadcrumbs", {"weight": 1.0, "density": 0.4, "gamma": 0.1, "rescale": True}, 8),
    ],
)
def test_state_dicts(method, parameters, ulps):
    from mergekit.merge_methods import merge_state_dicts

    base, models, scale = family()
    arguments = ([base, *models], method)
    options = {"parameters": parameters, "base": 0}
    close(
        compat.merge_state_dicts(*arguments, **options),
        merge_state_dicts(*arguments, **options),
        ulps,
        scale,
    )


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_has_mergekits_distribution(method):
    """Masks differ, so moments: with one constant task vector the values, their shares, and the
    kept norm.
    """
    from mergekit.merge_methods import merge_state_dicts

    n, density = 100_000, 0.3
    base = {"w": torch.zeros(n)}
    models = [{"w": torch.ones(n)}, {"w": 2 * torch.ones(n)}]
    options = {"parameters": {"weight": 1.0, "density": density}, "base": 0}
    torch.manual_seed(0)
    ours = compat.merge_state_dicts([base, *models], method, **options)["w"]
    theirs = merge_state_dicts([base, *models], method, **options)["w"]
    for k in (0, 1, 2, 3):
        shares = [((w * density).round() == k).float().mean().item() for w in (ours, theirs)]
        # Six standard deviations of the difference of two binomial shares.
        assert abs(shares[0] - shares[1]) < 6 * (0.5 / n) ** 0.5
    # Each l1 norm is restored exactly, so the mean is, up to fp32 sums.
    assert ours.double().mean().item() == pytest.approx(theirs.double().mean().item(), rel=1e-4)
    assert ours.double().mean().item() == pytest.approx(3, rel=1e-4)


@pytest.mark.parametrize("method", ["magnitude", "magnitude_outliers"])
@pytest.mark.parametrize("norm", [None, "l1", "l2", "linf"])
@pytest.mark.parametrize("density", [0.0, 0.001, 0.35, 1.0])
def test_sparsify(method, norm, density):
    from mergekit.sparsify import RescaleNorm, SparsificationMethod, sparsify

    x = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    theirs = sparsify(
        x,
        density,
        SparsificationMethod(method),
        gamma=0.05,
        rescale_norm=None if norm is None else RescaleNorm(norm),
    )
    ours = compat.sparsify(x, density, method, gamma=0.05, rescale_norm=norm)
    assert ((ours == 0) == (theirs == 0)).all()
    torch.testing.assert_close(ours, theirs, rtol=0 if norm is None else 4 * ULP, atol=0)


# peft


@pytest.mark.parametrize("function", ["task_arithmetic", "magnitude_prune", "ties"])
@pytest.mark.parametrize("density", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_peft(function, density, sign):
    from peft.utils import merge_utils

    _, models, _ = family(4, seed=3)
    for name in models[0]:
        tensors = [m[name] for m in models]
        arguments = [tensors, torch.tensor([0.5, 1.0, -0.25, 2.0])]
        if function != "task_arithmetic":
            arguments.append(density)
        options = {"majority_sign_method": sign} if function == "ties" else {}
        ours = getattr(compat_peft, function)(*arguments, **options)
        theirs = getattr(merge_utils, function)(*arguments, **options)
        scale = torch.stack([x.abs() * 2 for x in tensors]).sum(0)
        assert ((ours - theirs).abs() <= 2 * ULP * scale).all()


def test_peft_pieces():
    from peft.utils import merge_utils

    stacked = torch.randn(5, 40, 3, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    for sign in ("total", "frequency"):
        mask = compat_peft.calculate_majority_sign_mask(stacked, sign)
        assert torch.equal(mask, merge_utils.calculate_majority_sign_mask(stacked, sign))
        assert torch.equal(
            compat_peft.disjoint_merge(stacked, mask), merge_utils.disjoint_merge(stacked, mask)
        )
    x = torch.randn(999, generator=torch.Generator().manual_seed(1))
    assert torch.equal(
        compat_peft.magnitude_based_pruning(x, 0.3), merge_utils.magnitude_based_pruning(x, 0.3)
    )


@pytest.mark.parametrize("function", ["dare_linear", "dare_ties"])
def test_peft_dare_distribution(function):
    from peft.utils import merge_utils

    n, density = 100_000, 0.4
    arguments = ([torch.ones(n), -2 * torch.ones(n)], torch.tensor([1.0, 1.0]), density)
    torch.manual_seed(0)
    ours, theirs = (
        getattr(compat_peft, function)(*arguments),
        getattr(merge_utils, function)(*arguments),
    )
    assert set(ours.unique().tolist()) == set(theirs.unique().tolist())
    for value in theirs.unique():
        shares = [(w == value).float().mean().item() for w in (ours, theirs)]
        assert abs(shares[0] - shares[1]) < 6 * (0.5 / n) ** 0.5


# Folders


def save(model, path, seed, base=None):
    torch.manual_seed(seed)
    with torch.no_grad():
        start = None if base is None else base.state_dict()
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(noise if start is None else start[name] + 0.1 * noise)
    model.save_pretrained(path)
    return model


def make_family(folder, build):
    base = save(build(), folder / "base", 0)
    for i, name in enumerate("abc", start=1):
        save(build(), folder / name, i, base)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    make_family(folder, lambda: LlamaForCausalLM(config))
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    from transformers import BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("bert")
    config = BertConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=16,
    )
    make_family(folder, lambda: BertForSequenceClassification(config))
    return folder


def tensors_of(folder):
    return {
        name: tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def located(config, folder):
    if isinstance(config, dict):
        return {
            key: str(folder / value) if key in ("model", "base_model") else located(value, folder)
            for key, value in config.items()
        }
    return [located(item, folder) for item in config] if isinstance(config, list) else config


def compare(folder, config, ulps, out):
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    # By full path: mergekit keeps its loaders by name for the life of the process.
    config = located(config, folder)
    options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)
    run_merge(MergeConfiguration.model_validate(config), str(out / "theirs"), options)
    (out / "recipe.yml").write_text(yaml.safe_dump(config))
    pymerge.merge_checkpoints(out / "recipe.yml", out / "ours")
    ours, theirs = tensors_of(out / "ours"), tensors_of(out / "theirs")
    every = [tensors_of(folder / name) for name in ("base", "a", "b", "c")]
    largest = {}
    for name in theirs:
        # Renumbered layers have other inputs: there the largest weight of the tensor stands for
        # them.
        sliced = "slices" in config
        sizes = torch.stack(
            [state[name].abs() for state in every if name in state] or [theirs[name].abs()]
        )
        largest[name] = torch.full_like(sizes[0], 5.0) if sliced else sizes.amax(0)
    close({name: ours[name] for name in theirs}, theirs, ulps, largest)
    ours_config = json.loads((out / "ours" / "config.json").read_text())
    theirs_config = json.loads((out / "theirs" / "config.json").read_text())
    assert ours_config["num_hidden_layers"] == theirs_config["num_hidden_layers"]


def models(*names, **parameters):
    return [{"model": name, "parameters": dict(parameters)} for name in names]


GRADIENT = [0.1, 0.9, 0.3]
RECIPES = {
    "gradients": (
        {
            "merge_method": "ties",
            "base_model": "base",
            "models": [
                {"model": "a", "parameters": {"weight": [0, 1], "density": [1, 0.2, 0.6]}},
                {"model": "b", "parameters": {"weight": GRADIENT, "density": 0.3}},
            ],
            "parameters": {"lambda": [0.5, 1.5], "normalize": [True, False]},
        },
        0,
    ),
    "filters": (
        {
            "merge_method": "breadcrumbs_ties",
            "base_model": "base",
            "models": [
                {
                    "model": "a",
                    "parameters": {
                        "weight": [{"filter": "mlp", "value": GRADIENT}, {"value": 0.4}]
                    },
                },
                {"model": "b", "parameters": {"weight": [{"filter": "attn", "value": 0.9}]}},
                {"model": "base"},
                {"model": "c"},
            ],
            "parameters": {
                "weight": [
                    {"filter": "layers.2", "value": -0.2},
                    {"filter": "layer.2", "value": -0.2},
                    {"value": 0.6},
                ],
                "density": [{"filter": "embed", "value": 0.9}, {"value": [0.3, 0.7]}],
                "gamma": 0.05,
            },
        },
        0,
    ),
    "linear with base": (
        {
            "merge_method": "linear",
            "base_model": "base",
            "models": models("a", "b", weight=GRADIENT),
            "parameters": {"weight": 0.25},
        },
        2,
    ),
    "task arithmetic": (
        {
            "merge_method": "task_arithmetic",
            "base_model": "base",
            "models": models("c", "a", "b", weight=GRADIENT),
            "parameters": {"normalize": True, "density": 0.1},
        },
        0,
    ),
}
SLICED = {
    "stacked": (
        {
            "merge_method": "passthrough",
            "slices": [
                {"sources": [{"model": "a", "layer_range": [0, 3]}]},
                {
                    "sources": [
                        {"model": "b", "layer_range": [1, 4], "parameters": {"scale": [0.5, 2]}}
                    ]
                },
            ],
        },
        0,
    ),
    "levels": (
        {
            "merge_method": "linear",
            "slices": [
                {
                    "sources": [
                        {
                            "model": "a",
                            "layer_range": [0, 2],
                            "parameters": {"weight": {"filter": "mlp", "value": [0.2, 0.8]}},
                        },
                        {"model": "b", "layer_range": [2, 4]},
                    ],
                    "parameters": {"weight": {"filter": "layers.2", "value": 0.7}},
                },
                {
                    "sources": [
                        {"model": "c", "layer_range": [1, 2]},
                        {"model": "b", "layer_range": [3, 4]},
                    ],
                    "parameters": {"normalize": False, "weight": [0.1, 0.6]},
                },
            ],
            "parameters": {"weight": GRADIENT, "normalize": True},
        },
        2,
    ),
    "ties": (
        {
            "merge_method": "ties",
            "base_model": "base",
            "slices": [
                {
                    "sources": [
                        {"model": "a", "layer_range": [0, 3], "parameters": {"weight": GRADIENT}},
                        {"model": "base", "layer_range": [0, 3]},
                        {"model": "b", "layer_range": [0, 3]},
                    ],
                },
                {
                    "sources": [
                        {"model": "c", "layer_range": [3, 4]},
                        {"model": "a", "layer_range": [3, 4]},
                    ],
                    "base_model": "c",
                    "parameters": {"density": 0.9},
                },
            ],
            "parameters": {"weight": 0.7, "density": [0.4, 0.6]},
        },
        0,
    ),
}


@pytest.mark.parametrize("name", [*RECIPES, *SLICED])
def test_llama(name, llama, tmp_path):
    config, ulps = {**RECIPES, **SLICED}[name]
    compare(llama, config, ulps, tmp_path)


@pytest.mark.parametrize("name", RECIPES)
def test_bert(name, bert, tmp_path):
    config, ulps = RECIPES[name]
    compare(bert, config, ulps, tmp_path)


def test_run_merge_takes_mergekits_configuration(llama, tmp_path):
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    config = located(RECIPES["gradients"][0], llama)
    compat.run_merge(
        MergeConfiguration.model_validate(config), str(tmp_path / "x"), MergeOptions(quiet=True)
    )
    pymerge.merge_checkpoints(config, tmp_path / "y")
    x, y = tensors_of(tmp_path / "x"), tensors_of(tmp_path / "y")
    assert x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
    assert len(list((tmp_path / "x").glob("*.safetensors"))) == 1  # of 5B parameters by default
    options = {"allow_crimes": True, "trust_remote_code": True, "lazy_unpickle": True}
    few = MergeOptions(out_shard_size=20_000, write_model_card=False, **options)
    compat.run_merge(config, str(tmp_path / "z"), few)
    assert len(list((tmp_path / "z").glob("*.safetensors"))) > 1
    assert not (tmp_path / "z" / "README.md").exists()
    for refused in (
        {"safe_serialization": False},
        {"lora_merge_dtype": "bfloat16"},
        {"unsafe_truncate_embeddings": True},
    ):
        with pytest.raises(ValueError, match=f"options.{next(iter(refused))}"):
            compat.run_merge(config, str(tmp_path / "z"), MergeOptions(**refused))


# Tokenizers


WORDS = [f"w{i}" for i in range(40)]
REVERSED = ["w0", *WORDS[:0:-1]]
VOCABULARIES = {
    "permuted": (WORDS, REVERSED, WORDS),
    "all permuted": (WORDS[7:] + WORDS[:7], REVERSED, WORDS),
    "added to one": (WORDS, [*WORDS, "<|im_start|>", "<|im_end|>"], WORDS),
    "added to both": (WORDS, [*WORDS, "<a>", "<b>"], [*WORDS, "<c>", "<a>"]),
    "replaced": (WORDS, [*WORDS[:5], "gene", *WORDS[6:]], WORDS),
}


def token_family(folder, vocabularies, tied=False):
    """base, a and b with a row a token."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    for seed, (name, words) in enumerate(zip(("base", "a", "b"), vocabularies, strict=True)):
        config = LlamaConfig(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
        )
        save(LlamaForCausalLM(config), folder / name, seed)
        ordinary = {w: i for i, w in enumerate(words) if w[0] != "<"}
        made = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel(ordinary, unk_token="w0")), unk_token="w0"
        )
        made.add_tokens([w for w in words if w[0] == "<"], special_tokens=True)
        assert made.get_vocab() == {w: i for i, w in enumerate(words)}
        made.save_pretrained(folder / name)


def token_config(method, tokenizer):
    config = {"merge_method": method, "base_model": "base", "models": models("a", "b", weight=0.4)}
    if method == "linear":
        config["models"].append({"model": "base", "parameters": {"weight": 0.3}})
    if method == "ties":
        config["parameters"] = {"density": 0.6}
    return config | tokenizer


def compare_tokens(folder, config, out):
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = located(config, folder)
    for key in ("tokenizer_source", "tokenizer"):
        given = config.get(key)
        if given not in (None, "base"):
            source = given if isinstance(given, str) else given["source"]
            path = source if source == "base" else str(folder / source)
            config[key] = path if isinstance(given, str) else {**given, "source": path}
    options = MergeOptions(quiet=True, write_model_card=False)
    run_merge(MergeConfiguration.model_validate(config), str(out / "theirs"), options)
    (out / "recipe.yml").write_text(yaml.safe_dump(config))
    pymerge.merge_checkpoints(out / "recipe.yml", out / "ours")
    ours, theirs = tensors_of(out / "ours"), tensors_of(out / "theirs")
    # Rows of several models meet in one: the largest weight stands for all of them.
    close(ours, theirs, 4, {name: torch.full_like(t, 5.0) for name, t in theirs.items()})
    sizes = [json.loads((out / w / "config.json").read_text())["vocab_size"] for w in ("ours", "theirs")]  # fmt: skip
    assert sizes[0] == sizes[1] == len(ours["model.embed_tokens.weight"])
    loaded = [AutoTokenizer.from_pretrained(out / which) for which in ("ours", "theirs")]
    assert loaded[0].get_vocab() == loaded[1].get_vocab()
    model, report = AutoModelForCausalLM.from_pretrained(out / "ours", output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(model.get_input_embeddings().weight, ours["model.embed_tokens.weight"])


@pytest.mark.parametrize("source", ["base", "a"])
@pytest.mark.parametrize(
    ("case", "method"),
    [
        *((case, "ties") for case in VOCABULARIES),
        ("permuted", "linear"),
        ("added to both", "linear"),
        ("added to one", "task_arithmetic"),
    ],
)
def test_rows_move_as_in_mergekit(case, method, source, tmp_path):
    token_family(tmp_path, VOCABULARIES[case])
    compare_tokens(tmp_path, token_config(method, {"tokenizer_source": source}), tmp_path)


@pytest.mark.parametrize("source", ["base", "a"])
def test_tied_rows_move_as_in_mergekit(source, tmp_path):
    token_family(tmp_path, VOCABULARIES["added to both"], tied=True)
    compare_tokens(tmp_path, token_config("ties", {"tokenizer_source": source}), tmp_path)


@pytest.mark.parametrize("source", ["base", "a"])
def test_padding_as_in_mergekit(source, tmp_path):
    token_family(tmp_path, VOCABULARIES["added to both"])
    tokenizer = {"tokenizer": {"source": source, "pad_to_multiple_of": 16}}
    compare_tokens(tmp_path, token_config("linear", tokenizer), tmp_path)
