"""Statistics of the real encoder's four fine-tunes, each on its own training texts.

    python benchmarks/quality/collect_minilm.py --out DIR

writes DIR/TASK.safetensors (36 linear layers: Gram matrices of inputs and of output gradients,
diagonal Fishers of all parameters of the encoder blocks) and, under DIR/models, the model folders
themselves. The loss is the cross-entropy of the frozen head's logits.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from minilm_tasks import TASKS, Batch, Evaluator, write_model_folders  # noqa: E402

from pymerge.statistics import Prediction, Statistics, collect, load  # noqa: E402

KINDS = ("input_gram", "output_grad_gram", "diagonal_fisher")


def collect_task(
    evaluator: Evaluator,
    model: Path,
    task: str,
    out: Path,
    *,
    labels: str = "true",
    kinds: tuple[str, ...] = KINDS,
    split: str = "train",
) -> Statistics:
    """Statistics of one model on one task's texts, by the evaluator's frozen head."""
    evaluator.load(model)

    def loss(_: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Prediction:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return Prediction(evaluator.logits(inputs, task), batch["labels"])

    def joined(batch: Batch) -> dict[str, torch.Tensor]:
        return {**batch[0], "labels": batch[1]}

    batches = [joined(batch) for batch in evaluator.batches(task, split)]
    return collect(
        evaluator.model,
        batches,
        loss=loss,
        kinds=kinds,
        layers="encoder.layer.*",
        labels=labels,
        model_name=f"all-MiniLM-L6-v2 fine-tuned on {task}",
        out=out,
    )


def collect_all(out: Path, labels: str = "true") -> dict[str, Statistics]:
    """Statistics of all tasks; a file that is there already is kept."""
    folders = write_model_folders(out / "models")
    evaluator = Evaluator(folders["base"])
    found = {}
    for task in TASKS:
        path = out / f"{task}.safetensors"
        if path.exists():
            found[task] = load(path)
            continue
        start = time.perf_counter()
        found[task] = collect_task(evaluator, folders[task], task, path, labels=labels)
        print(f"{path}: {time.perf_counter() - start:.1f} s, {path.stat().st_size / 1e6:.0f} MB")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the statistics files")
    parser.add_argument("--labels", choices=("true", "empirical", "exact"), default="true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    collect_all(arguments.out, arguments.labels)


if __name__ == "__main__":
    main()
