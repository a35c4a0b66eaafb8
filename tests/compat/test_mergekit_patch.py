"""mergekit with the patch on: its own commands and functions give what they gave without it, computed
by the kernels (pytest -m parity). Written for 0.1.4 and 0.1.5.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import pymerge
from pymerge.compat import _mergekit_patch
from pymerge.compat import mergekit as ours

pytestmark = pytest.mark.parity

mergekit = pytest.importorskip("mergekit", reason="mergekit is not installed")
arithmetic = pytest.importorskip("mergekit.merge_methods.generalized_task_arithmetic")
AS_0_1_4 = hasattr(arithmetic, "GTATask")
OF_0_1_5 = pytest.mark.skipif(AS_0_1_4, reason="mergekit 0.1.4 merges folders and files only")

METHODS = {
    "linear": {"weight": True},
    "task_arithmetic": {"weight": True, "lambda": 0.7},
    "ties": {"weight": True, "density": 0.4},
    "breadcrumbs": {"weight": True, "density": 0.7, "gamma": 0.02},
    "breadcrumbs_ties": {"weight": True, "density": 0.7, "gamma": 0.02, "rescale": True},
    "dare_linear": {"weight": True, "density": 0.5},
    "dare_ties": {"weight": True, "density": 0.5, "rescale": False},
    "della": {"weight": True, "density": 0.5, "epsilon": 0.1},
    "della_linear": {"weight": True, "density": 0.5, "epsilon": 0.1},
    "slerp": {"t": 0.3},
    "nuslerp": {"weight": True},
    "multislerp": {"weight": True, "normalize_weights": False},
    "karcher": {"max_iter": 5},
    "model_stock": {"filter_wise": True},
    "nearswap": {"t": 0.01},
    "sce": {"select_topk": 0.4},
    "arcee_fusion": {},
    "ram": {"epsilon": 0.01},
    "ramplus_tl": {"epsilon": 0.01, "alpha": 0.4},
}
WITHOUT_BASE = ("linear", "karcher")
ONE_MODEL = ("slerp", "nearswap", "arcee_fusion")  # beside the base
if AS_0_1_4:
    del METHODS["ram"], METHODS["ramplus_tl"]
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")


@pytest.fixture(autouse=True)
def unpatched():
    before = own_functions()
    yield
    ours.unpatch()
    assert own_functions() == before


def own_functions():
    return [getattr(owner, name) for owner, name, *_ in ours._patches()._attributes]


@pytest.fixture
def calls(monkeypatch):
    """Names of the methods that the kernels were called for."""
    found = []

    def counted(method, *arguments, **options):
        found.append(method.name)
        return original(method, *arguments, **options)

    original = _mergekit_patch.run_bound
    monkeypatch.setattr(_mergekit_patch, "run_bound", counted)
    return found


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("family")
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    for name in ("base", "a", "b"):
        LlamaForCausalLM(config).save_pretrained(folder / name)
    return folder


def recipe(folder, method, *, suffix="", **more):
    """A configuration of two models and, where the method takes one, a base."""
    parameters = {k: v for k, v in METHODS[method].items() if k != "weight"}
    models = [{"model": f"{folder}/{name}{suffix}"} for name in ("a", "b")]
    if "weight" in METHODS[method]:
        for entry, weight in zip(models, (0.75, 0.5), strict=True):
            entry["parameters"] = {"weight": weight}
    found = {"merge_method": method, "models": models, "parameters": parameters, **more}
    if method not in WITHOUT_BASE:
        found["base_model"] = f"{folder}/base{suffix}"
    if method in ONE_MODEL:
        found["models"][1]["model"] = found["base_model"]
    return found


def run(config, out, seed=3):
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    options = MergeOptions(quiet=True, copy_tokenizer=False, random_seed=seed)
    run_merge(MergeConfiguration.model_validate(config), str(out), options=options)
    return weights(out)


def weights(out):
    return {k: t for path in out.glob("*.safetensors") for k, t in load_file(path).items()}


def assert_close(mine, theirs):
    assert mine.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert mine[name].dtype == expected.dtype
        step = torch.finfo(expected.dtype).eps * expected.abs().max()
        assert (mine[name] - expected).abs().max() <= 4 * step, name


@pytest.mark.parametrize("method", METHODS)
def test_run_merge(family, tmp_path, method, calls):
    theirs = run(recipe(family, method), tmp_path / "theirs")
    assert not calls
    with ours.patch():
        mine = run(recipe(family, method), tmp_path / "mine")
        assert calls == [method] * len(mine)
        again = run(recipe(family, method), tmp_path / "again")
    assert all(torch.equal(mine[name], again[name]) for name in mine)
    if method in RANDOM:
        assert mine.keys() == theirs.keys()
        assert not all(torch.equal(mine[name], theirs[name]) for name in mine)
        with ours.patch():
            other = run(recipe(family, method), tmp_path / "other", seed=4)
        assert not all(torch.equal(mine[name], other[name]) for name in mine)
    else:
        assert_close(mine, theirs)


@pytest.mark.parametrize("method", ["ties", "linear"])
def test_inputs_in_the_recipes_dtype_are_rounded_once_more(family, tmp_path, method, calls):
    """mergekit reads in `dtype`; what it then rounds after every step is rounded at the end."""
    with ours.patch():
        mine = run(recipe(family, method, dtype="bfloat16"), tmp_path / "mine")
    assert calls
    base, *models = (
        {name: t.bfloat16() for name, t in weights(family / each).items()}
        for each in ("base", "a", "b")
    )
    options = {"weights": [0.75, 0.5], "merge": "weighted_mean"}
    options |= {"density": 0.4} if method == "ties" else {"trim": "none", "elect": "none"}
    expected = pymerge.ties(models, base if method == "ties" else None, **options)
    assert all(torch.equal(mine[name], expected[name]) for name in expected)


def test_mergekit_yaml(family, tmp_path, calls):
    from mergekit.scripts.run_yaml import main

    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump(recipe(family, "ties")))
    command = [str(path), "--no-copy-tokenizer", "--quiet"]
    runner = CliRunner()
    assert runner.invoke(main, [*command, str(tmp_path / "theirs")]).exit_code == 0
    with ours.patch():
        result = runner.invoke(main, [*command, str(tmp_path / "mine")], catch_exceptions=False)
    assert result.exit_code == 0 and calls
    assert_close(weights(tmp_path / "mine"), weights(tmp_path / "theirs"))


@pytest.mark.parametrize("method", [name for name in METHODS if name not in RANDOM])
def test_mergekit_pytorch(tmp_path, method, calls):
    from mergekit.scripts.merge_raw_pytorch import main

    generator = torch.Generator().manual_seed(0)
    for name in ("base", "a", "b"):
        tensors = {f"w{i}": torch.randn(9, 7 + i, generator=generator) for i in range(3)}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    config = recipe(tmp_path, method, suffix=".safetensors")
    if method not in (*WITHOUT_BASE, *ONE_MODEL):  # 0.1.4 has it listed, with all parameters
        own = {"weight": 1.0, "density": 1.0, "gamma": 0.0}
        config["models"].append({"model": config["base_model"], "parameters": own})
        for entry in config["models"]:
            entry["parameters"] = own | METHODS[method] | entry.get("parameters", {})
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump(config))
    runner = CliRunner()
    for out in ("theirs", "mine"):
        with ours.patch() if out == "mine" else torch.no_grad():
            arguments = [str(path), str(tmp_path / out)]
            result = runner.invoke(main, arguments, catch_exceptions=False)
        assert result.exit_code == 0
    assert calls == [method] * 3
    assert_close(weights(tmp_path / "mine"), weights(tmp_path / "theirs"))


def states(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {
        name: {
            "w": torch.randn(12, 5, generator=generator).to(dtype),
            "v": torch.randn(12, 5, generator=generator).to(dtype),
            "scalar": torch.randn((), generator=generator).to(dtype),
            "ids": torch.arange(3),
        }
        for name in ("base", "x", "y")
    }


@OF_0_1_5
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("method", [name for name in METHODS if name not in RANDOM])
def test_state_dicts_and_tensors(method, dtype, calls):
    from mergekit.merge_methods import merge_state_dicts, merge_tensors

    models = states(dtype)
    if method in ONE_MODEL:
        del models["y"]
    by_name = {"base": 0.25, "x": 0.75, "y": 0.5}
    if method != "linear":
        del by_name["base"]
    parameters = dict(METHODS[method])
    in_order = dict(parameters)
    if "weight" in parameters:
        parameters["weight"], in_order["weight"] = by_name, [*by_name.values()]
    if method in WITHOUT_BASE:
        base, place = {}, {}
    else:
        base, place = {"base": "base"}, {"base_index": 0}
    tensors = [state["w"] for state in models.values()]

    def merged():
        whole = merge_state_dicts(models, method, parameters=parameters, **base)
        return whole, merge_tensors(tensors, method, parameters=in_order, **place)

    theirs, one = merged()
    assert not calls
    with ours.patch():
        mine, other = merged()
    assert calls == [method] * 4
    assert torch.equal(mine.pop("ids"), theirs.pop("ids")) and torch.equal(mine["w"], other)
    assert mine.keys() == theirs.keys()
    for name, expected in [*theirs.items(), ("w", one)]:
        assert mine[name].dtype == dtype
        # In bf16, mergekit rounds after every step.
        steps = 16 if dtype == torch.bfloat16 and method != "linear" else 4
        allowed = steps * torch.finfo(dtype).eps * 4
        close = (mine[name] - expected).abs() <= allowed
        assert close.float().mean() >= (0.9 if dtype == torch.bfloat16 else 1.0), name


@OF_0_1_5
@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_gradients_are_never_cut_off(method, calls):
    from mergekit.merge_methods import merge_state_dicts

    models = [torch.nn.Linear(3, 2, bias=False) for _ in range(3)]
    base = {} if method == "linear" else {"base": 0}
    with ours.patch():
        merged = merge_state_dicts(models, method, parameters={"weight": 0.5}, **base)
        merged["weight"].sum().backward()
        assert not calls and all(model.weight.grad is not None for model in models)
        with torch.no_grad():
            assert not merge_state_dicts(models, method, parameters={"weight": 0.5}, **base)[
                "weight"
            ].requires_grad
    assert calls


LEFT = {
    "weights that sum to 0": ("linear", {"weight": [1.0, -1.0, 0.0]}),
    "weights that sum to 0, on a sphere": ("multislerp", {"weight": [1.0, -1.0]}),
    "more than all": ("ties", {"weight": [1.0, 0.5], "density": 1.5}),
    "a share above 1": ("sce", {"select_topk": 1.5}),
    "less than none": ("breadcrumbs", {"weight": 1.0, "density": 0.5, "gamma": -0.1}),
    "a negative threshold": ("ram", {"epsilon": -1.0}),
}


@OF_0_1_5
@pytest.mark.parametrize("case", LEFT)
def test_values_that_the_kernels_refuse_are_mergekits(case, calls):
    from mergekit.merge_methods import merge_tensors

    method, parameters = LEFT[case]
    tensors = [state["w"] for state in states().values()]
    base = {} if method in WITHOUT_BASE else {"base_index": 0}
    theirs = merge_tensors(tensors, method, parameters=parameters, **base)
    with ours.patch():
        mine = merge_tensors(tensors, method, parameters=parameters, **base)
    assert not calls and torch.equal(mine.view(torch.int32), theirs.view(torch.int32))


@OF_0_1_5
def test_values_that_mergekit_refuses_are_refused_by_it(calls):
    from mergekit.merge_methods import merge_tensors

    tensors = [state["w"] for state in states().values()]
    parameters = {"weight": 1.0, "density": 0.05, "epsilon": 0.1}
    with ours.patch(), pytest.raises(ValueError, match="Epsilon must be chosen"):
        merge_tensors(tensors, "della", parameters=parameters, base_index=0)
    assert not calls


@OF_0_1_5
@pytest.mark.parametrize("method", [name for name in METHODS if name not in RANDOM])
def test_devices_without_kernels_are_mergekits(method, calls):
    from mergekit.merge_methods import merge_tensors

    tensors = [state["w"].to("meta") for state in states().values()]
    tensors = tensors[: 2 if method in ONE_MODEL else 3]
    parameters = METHODS[method] | ({"weight": 1.0} if "weight" in METHODS[method] else {})
    base = {} if method in WITHOUT_BASE else {"base_index": 0}
    # Some methods ask for a value on the way.
    with ours.patch(), contextlib.suppress(RuntimeError, NotImplementedError):
        merge_tensors(tensors, method, parameters=parameters, **base)
    assert not calls


@OF_0_1_5
def test_one_model_of_a_tensor_that_the_others_lack():
    from mergekit.merge_methods import merge_tensors

    base, model, _ = (state["w"] for state in states().values())
    for method in ("ram", "multislerp", "ties", "sce"):
        parameters = METHODS[method] | ({"weight": 1.0} if "weight" in METHODS[method] else {})
        for tensors in ([base], [base, model]):
            if method == "multislerp" and len(tensors) == 1:
                continue
            theirs = merge_tensors(tensors, method, parameters=parameters, base_index=0)
            with ours.patch():
                mine = merge_tensors(tensors, method, parameters=parameters, base_index=0)
            torch.testing.assert_close(mine, theirs)


@OF_0_1_5
def test_values_that_are_not_finite_are_refused_by_name():
    from mergekit.merge_methods import merge_state_dicts

    models = states()
    models["y"]["w"][0, 0] = torch.nan
    with ours.patch(), pytest.raises(ValueError, match=r"of tensor 'w' \(y: 1, of 60\)"):
        merge_state_dicts(models, "ties", parameters={"weight": 1.0}, base="base")
    with ours.patch(), pytest.raises(ValueError, match=r"NaN or infinite .*\(input 2: 1, of 60\)"):
        merge_state_dicts(models, "linear", parameters={"weight": 1.0})


def test_patches_nest():
    before = own_functions()
    with ours.patch():
        inside = own_functions()
        assert all(mine is not theirs for mine, theirs in zip(inside, before, strict=True))
        with ours.patch():
            pass
        assert own_functions() == inside
    assert own_functions() == before
