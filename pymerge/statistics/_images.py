"""Batches of images from the files that a .jsonl file names, for image classifiers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from pymerge.checkpoint.files import open_regular, reason
from pymerge.statistics._batches import NUMBERS
from pymerge.statistics._text import Example


class ImageBatches:
    """Images in the order of their file, as the model's processor makes them; can be read any
    number of times.

    folder: in which images whose names are relative lie. first: the number of the first example in
    the whole data, of which these may be a part.
    """

    def __init__(
        self,
        processor: Any,
        examples: Sequence[Example],
        folder: Path,
        *,
        batch_size: int,
        labels: Sequence[int] | None = None,
        first: int = 0,
    ) -> None:
        lines = [example.line for example in examples if example.image is None]
        if lines:
            raise ValueError(
                f"line {lines[0]} has no image, and the model classifies images; every line needs"
                ' one, {"image": "cat.png", "label": ...}'
            )
        self.processor, self.examples, self.folder = processor, examples, folder
        self.batch_size, self.labels, self.first = batch_size, labels, first

    def __len__(self) -> int:
        return -(-len(self.examples) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for low in range(0, len(self.examples), self.batch_size):
            yield self._batch(range(low, min(low + self.batch_size, len(self.examples))))

    def _batch(self, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        images = [self._image(self.examples[number]) for number in numbers]
        batch = dict(self.processor(images, return_tensors="pt"))
        batch[NUMBERS] = torch.tensor(
            [self.first + number for number in numbers], dtype=torch.int64, device="cpu"
        )
        if self.labels is not None:
            batch["labels"] = torch.tensor(
                [self.labels[number] for number in numbers], dtype=torch.int64, device="cpu"
            )
        return batch

    def _image(self, example: Example) -> Any:
        """Of three channels, decoded. ValueError that names the line."""
        try:
            from PIL import Image
        except ImportError as error:
            raise ValueError(
                "pillow, which reads images, is not installed; run: pip install pillow"
            ) from error
        assert example.image is not None
        path = self.folder / example.image
        try:
            with open_regular(path) as file, Image.open(file) as image:
                return image.convert("RGB")
        except OSError as error:
            if error.errno is not None:
                raise ValueError(f"line {example.line}: {path} {reason(error)}") from error
            what = str(error)  # pillow's own
        except MemoryError:
            raise
        except Exception as error:  # each of pillow's formats raises its own
            what = str(error)
        raise ValueError(
            f"line {example.line}: {path} is no image that pillow reads ({what[:200]}); take the"
            " line out"
        )
