"""Errors speak of the function that was called: by its own arguments, and of options that it
takes.
"""

from __future__ import annotations

import inspect
import re
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from folder_cases import write_model

import pymerge
from pymerge.compat import mergekit, peft, ties_merging
from pymerge.messages.arguments import argument, entry_point, named_as, of_model, renamed, takes

NAN = torch.tensor([float("nan"), 1.0])
ONE = torch.ones(2)
WEIGHTS = torch.ones(2)
PARAMETERS = {"weight": 1.0}


def calls(bad: Any) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]]:
    """Every drop-in that computes, with a bad second tensor (the only one where there is one)."""
    many = [ONE, bad]
    states = {"a": {"w": ONE}, "b": {"w": bad}}
    named = {"parameters": PARAMETERS}
    return {
        "prune": (peft.prune, (bad, 0.5, "magnitude"), {}),
        "prune random": (peft.prune, (bad, 0.5, "random", True), {}),
        "magnitude_based_pruning": (peft.magnitude_based_pruning, (bad, 0.5), {}),
        "random_pruning": (peft.random_pruning, (bad, 0.5, True), {}),
        "task_arithmetic": (peft.task_arithmetic, (many, WEIGHTS), {}),
        "magnitude_prune": (peft.magnitude_prune, (many, WEIGHTS, 0.5), {}),
        "ties": (peft.ties, (many, WEIGHTS, 0.5), {}),
        "dare_linear": (peft.dare_linear, (many, WEIGHTS, 0.9), {}),
        "dare_ties": (peft.dare_ties, (many, WEIGHTS, 0.9), {}),
        "merge_state_dicts": (mergekit.merge_state_dicts, (states, "linear"), named),
        "merge_tensors": (mergekit.merge_tensors, (many, "linear"), named),
        "sparsify": (mergekit.sparsify, (bad, 0.5, "magnitude"), {}),
    }


def error_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
        function(*args, **kwargs)
    return str(caught.value)


def assert_speaks_of(function: Callable[..., Any], message: str) -> None:
    own = set(inspect.signature(function).parameters)
    advised = set(re.findall(r"\b([a-z_]+)=(?!=)", message)) - {"PYMERGE_BACKEND"}
    indexed = set(re.findall(r"\b(\w+)\[", message))
    assert advised <= own and indexed <= own, message


NAMES = sorted(calls(ONE))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "bad",
    [NAN, torch.ones(2, dtype=torch.int64), "text", ONE.to_sparse(), ONE.to("meta")],
    ids=["nan", "integers", "no tensor", "sparse", "meta"],
)
def test_drop_ins_speak_of_their_own_arguments(name, bad):
    if name.startswith("prune") and isinstance(bad, str):
        pytest.skip("text has no elements to prune")
    function, args, kwargs = calls(bad)[name]
    if name == "merge_tensors" and not isinstance(bad, str) and not bad.is_floating_point():
        pytest.skip("integer tensors are copied")
    message = error_of(function, *args, **kwargs)
    assert_speaks_of(function, message)


@pytest.mark.parametrize("name", NAMES)
def test_drop_ins_do_not_advise_a_backend_that_they_cannot_choose(name, monkeypatch):
    function, args, kwargs = calls(ONE)[name]
    for backend in ("cuda", "gpu"):
        monkeypatch.setenv("PYMERGE_BACKEND", backend)
        message = error_of(function, *args, **kwargs)
        assert message.startswith(f"PYMERGE_BACKEND='{backend}' ")
        assert_speaks_of(function, message)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: peft.ties([], WEIGHTS, 0.5), "task_tensors is empty"),
        (lambda: peft.ties([ONE, torch.ones(3)], WEIGHTS, 0.5), r"task_tensors\[1\] has shape"),
        (lambda: peft.ties([ONE], WEIGHTS, 0.5), "weights has 2 values for 1 model"),
        (lambda: peft.random_pruning(NAN, 0.5, False), r"\(tensor: 1, of 2\); mend or leave out"),
        (lambda: peft.prune(ONE, -0.25, "random"), "density=-0.25 is"),
        (lambda: ties_merging.ties_merging(ONE[None], 101, "dis-sum"), "reset_thresh=101 is out"),
        (
            lambda: ties_merging.ties_merging(torch.ones(2, 3).int(), 20, "dis-sum"),
            r"flat_task_checks\[0\] is int32",
        ),
        (
            lambda: ties_merging.ties_merging(NAN[None], 20, "dis-sum"),
            r"flat_task_checks\[0\]: 1, of 2\); mend",
        ),
        (lambda: ties_merging.topk_values_mask(ONE, 100.5), "K=100.5 is outside"),
        (lambda: ties_merging.topk_values_mask(ONE.int(), 20), r"M\[0\] is int32"),
        (
            lambda: mergekit.merge_tensors([ONE, torch.ones(3)], "linear", parameters=PARAMETERS),
            r"^tensors\[1\] has shape \(3,\), tensors\[0\] \(2,\)",
        ),
        (
            lambda: mergekit.merge_tensors(
                [ONE, ONE, NAN], "ties", base_index=0, parameters=PARAMETERS
            ),
            r"\(tensors\[2\]: 1, of 2\)",
        ),
        (
            lambda: mergekit.merge_state_dicts(
                {"x": {"w": ONE}, "y": {"w": ONE}, "z": {"v": ONE}},
                "ties",
                base="x",
                parameters=PARAMETERS,
            ),
            r"models\['z'\] lacks w",
        ),
        (
            lambda: mergekit.merge_state_dicts(
                [{"w": ONE}] * 2, "ties", base=0, parameters={"weight": 1, "lambda": "x"}
            ),
            "lambda: 'x' is not a number",
        ),
        (
            lambda: mergekit.merge_state_dicts([{"w": ONE}] * 2, "mats", base=0),
            "mats merges by statistics; pymerge.merge takes them",
        ),
        (
            lambda: mergekit.sparsify(ONE, 0.5, "magnitude", rescale_norm="l3"),
            "rescale_norm='l3' is not one of",
        ),
    ],
)
def test_drop_ins_name_what_was_passed(call, said):
    with pytest.raises((ValueError, TypeError), match=said):
        call()


def test_ties_itself_says_how_to_let_non_finite_values_through():
    said = (
        r"\(models\[1\]: 1, of 2\); mend or leave out what holds them, or pass non_finite='allow'"
    )
    with pytest.raises(ValueError, match=said):
        pymerge.ties([ONE, NAN])
    with pytest.raises(ValueError, match="or pass non_finite='allow'"):
        pymerge.merge([{"w": NAN}], {"w": ONE})


def test_merge_names_the_parameter_that_was_passed():
    models = [{"w": ONE}, {"w": ONE}]
    with pytest.raises(ValueError, match=r"^weight\[1\]=nan is not finite"):
        pymerge.merge(models, method="linear", weight=[1, float("nan")])
    with pytest.raises(ValueError, match=r"^weights\[1\]=nan is not finite"):
        pymerge.merge(models, method="linear", weights=[1, float("nan")])
    with pytest.raises(ValueError, match=r"^weight=\[1, -1\] sum to zero"):
        pymerge.merge(models, method="linear", weight=[1, -1])
    with pytest.raises(ValueError, match=r"^scale has 2 values for 1 model"):
        pymerge.merge(models[:1], method="passthrough", scale=[1, 2])


def test_an_initialisation_names_its_options_and_the_weights():
    big = torch.full((2, 2), 3e38)
    gram = torch.eye(2)
    options: dict[str, Any] = {"init": "ties", "base": -big}
    # What overflows is the difference: both are finite.
    said = r"\(weights\[0\]: 4, of 4\).*or pass init_options=\{'non_finite': 'allow'\}"
    with pytest.raises(ValueError, match=said):
        pymerge.mats([big], [gram], **options)
    with pytest.raises(ValueError, match=said):
        pymerge.regmean([big], [gram], **options)
    with pytest.raises(ValueError, match=r"init_options=\{'flavor': 'papers'\} is not one of"):
        pymerge.mats([gram], [gram], init="ties", base=gram, init_options={"flavor": "papers"})
    with pytest.raises(ValueError, match=r"init_options\['density'\] has 3 values for 1 model"):
        pymerge.mats([gram], [gram], init="ties", base=gram, init_options={"density": [1, 1, 1]})
    with pytest.raises(ValueError, match=r"init_options\['density'\]\[0\]=2 is outside"):
        pymerge.mats([gram], [gram], init="ties", base=gram, init_options={"density": [2]})


def test_mergekits_run_merge_advises_nothing_of_merge_checkpoints(tmp_path):
    for name, tensor in (("a", ONE), ("b", NAN)):
        write_model(tmp_path / name, {"w": tensor})
    models = [{"model": str(tmp_path / n), "parameters": {"weight": 1}} for n in "ab"]
    config = {"merge_method": "linear", "models": models}
    with pytest.raises(ValueError, match=r"mend or leave out the model$"):
        mergekit.run_merge(config, str(tmp_path / "out"))
    with pytest.raises(ValueError, match="or let them through"):
        pymerge.merge_checkpoints(config, tmp_path / "out")


@pytest.mark.parametrize("call", [lambda: peft.ties([ONE], [1.0], 1.5), lambda: peft.prune(ONE, 2, "random")])  # fmt: skip
def test_warnings_point_at_the_caller(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert [warning.filename for warning in caught] == [__file__]


def test_an_entry_point_speaks_until_it_returns():
    @entry_point(models="inputs")
    def inner(inputs: object, fail: bool = False) -> tuple[str, str, str, bool, bool]:
        if fail:
            raise KeyError
        seed = argument("seed", 3)
        return argument("models"), of_model("models", 2), seed, takes("fail"), takes("seed")

    @entry_point(models="things")
    def outer(things: object) -> Any:
        return inner(things)

    plain = ("models", "models[2]", "seed=3", True, True)
    assert inner.__wrapped__(0) == plain
    assert inner(0) == ("inputs", "inputs[2]", "seed=3", True, False)
    assert outer(0) == ("things", "things[2]", "seed=3", False, False)
    with pytest.raises(KeyError):
        inner(0, fail=True)
    assert inner.__wrapped__(0) == plain
    with renamed("options", models=["x", "y", "z"]):
        said = inner.__wrapped__(0)
    assert said == ("models", "z", "options={'seed': 3}", True, True)


def test_other_threads_are_in_other_functions():
    said = []
    with renamed(models="inputs"):
        thread = threading.Thread(target=lambda: said.append(argument("models")))
        thread.start()
        thread.join()
    assert said == ["models"]


def test_a_command_line_takes_its_options_alone():
    with named_as({"seed": "--seed"}):
        assert argument("seed", 3) == "--seed 3"
        assert takes("seed") and not takes("non_finite")
