"""Batches of token ids from a file of texts, for a transformers model and task."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import torch

from pymerge.checkpoint.files import IrregularError, open_regular
from pymerge.messages.words import counted, shown, type_of
from pymerge.rules.types import Task
from pymerge.statistics._batches import NUMBERS

# Texts are put into order of length among so many batches, so that little is padded.
_WINDOW = 64
_MASKED_SHARE = 0.15
_IGNORED = -100
_LONGEST_LINE = 16 << 20
_PAIRS = (("input", "target"), ("prompt", "completion"))
_TEXTS = frozenset(("text", "text_pair", "image", *_PAIRS[0], *_PAIRS[1]))


@dataclass(frozen=True)
class Example:
    """A text, perhaps a second one to go with it, perhaps a label, perhaps the text that is to
    follow from it; or the name of an image file, perhaps with a label. line: where it stands in
    its file.
    """

    text: str
    pair: str | None = None
    label: int | str | None = None
    target: str | None = None
    image: str | None = None
    line: int = field(default=0, compare=False)


def read_examples(path: Path) -> list[Example]:
    """Examples of a .txt file (a text a line) or a .jsonl file (objects with "text" and perhaps
    "text_pair" and "label", or with "input" and "target", or "prompt" and "completion", or with
    "image" and perhaps "label").

    ValueError with the line's number where a line cannot be read; blank lines are skipped.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(
            f"{path} is no .txt or .jsonl file; pass one with a text a line, or a .jsonl file with"
            ' {"text": ..., "label": ...} a line'
        )
    examples = []
    try:
        with open_regular(path) as raw, TextIOWrapper(raw, encoding="utf-8-sig") as file:
            for number in itertools.count(1):
                line = file.readline(_LONGEST_LINE + 1)
                if not line:
                    break
                if len(line) > _LONGEST_LINE:
                    raise ValueError(
                        f"{path}, line {number} has more than {_LONGEST_LINE} characters; is it a"
                        " text a line?"
                    )
                if not line.strip():
                    continue
                if path.suffix == ".txt":
                    examples.append(Example(line.rstrip("\n"), line=number))
                else:
                    examples.append(_from_json(line, f"{path}, line {number}", number))
    except IrregularError as error:
        raise ValueError(f"{path} {error.strerror}; pass a file") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte {error.object[error.start]:#04x}); convert it, for"
            " example with iconv"
        ) from error
    if not examples:
        raise ValueError(f"{path} holds no texts")
    return examples


def _from_json(line: str, where: str, number: int) -> Example:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error})") from error
    _check_text(entry, where)
    if isinstance(entry, dict) and "text" not in entry:
        for source, target in _PAIRS:
            if isinstance(entry.get(source), str) and isinstance(entry.get(target), str):
                return Example(entry[source], target=entry[target], line=number)
    image = entry.get("image") if isinstance(entry, dict) and "text" not in entry else None
    if isinstance(image, str) and image and "\0" not in image:
        return Example("", label=_label(entry, where), image=image, line=number)
    if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
        raise ValueError(
            f'{where} has no "text"; a line is {{"text": ..., "label": ...}}, or {{"input": ...,'
            ' "target": ...}, or {"image": ..., "label": ...}'
        )
    pair = entry.get("text_pair")
    if pair is not None and not isinstance(pair, str):
        raise ValueError(f'{where}: "text_pair" is {type_of(pair)}; expected a string')
    return Example(entry["text"], pair, _label(entry, where), line=number)


def _check_text(entry: Any, where: str) -> None:
    """ValueError for what JSON can write and no tokenizer, no name of a file takes: told before the
    work, and not when the line's turn comes.
    """
    for name, value in entry.items() if isinstance(entry, dict) else ():
        if name in _TEXTS and isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ValueError(
                    f'{where}: "{name}" has half a surrogate pair, which is no text; write the'
                    " character itself, or take the line out"
                ) from None


def _label(entry: dict[str, Any], where: str) -> int | str | None:
    label = entry.get("label")
    if label is not None and (isinstance(label, bool) or not isinstance(label, (int, str))):
        raise ValueError(f'{where}: "label" is {type_of(label)}; expected a number or a name')
    return label


def label_numbers(examples: Sequence[Example], label2id: dict[str, int], classes: int) -> list[int]:
    """Every example's class number; names are looked up in the model's config. ValueError for one
    that has none.
    """
    numbers = []
    known = ", ".join(repr(name) for name in list(label2id)[:8])
    for example in examples:
        label = example.label
        if label is None:
            raise ValueError(
                f'line {example.line} has no label; every line needs one, {{"text": ..., "label":'
                " ...}, "
                f"of {known or f'0 to {classes - 1}'}; or draw labels from the model, --labels true"
            )
        number = label2id.get(label) if isinstance(label, str) else label
        if number is None:
            raise ValueError(
                f"line {example.line} has label {shown(label)}; the model knows {known}"
            )
        if not 0 <= number < classes:
            raise ValueError(
                f"line {example.line} has label {shown(number)}; the model has"
                f" {counted(classes, 'class', 'classes')}, from 0"
            )
        numbers.append(number)
    return numbers


class TextBatches:
    """Tokenised batches in an order that depends on the texts alone; can be read any number of
    times.

    first: the number of the first example in the whole data, of which these may be a part.
    """

    def __init__(
        self,
        tokenizer: Any,
        examples: Sequence[Example],
        *,
        batch_size: int,
        max_length: int,
        labels: Sequence[int] | None = None,
        task: Task = "causal-lm",
        seed: int = 0,
        first: int = 0,
    ) -> None:
        masked = task == "masked-lm"
        images = [example.line for example in examples if example.image is not None]
        if images:
            raise ValueError(
                f"line {images[0]} has an image, and {task} reads texts; pass lines with"
                ' {"text": ...}, or a model that classifies images'
            )
        lines = [example.line for example in examples if example.target is None]
        self.targets = len(lines) < len(examples)
        if lines and (self.targets or task == "seq2seq"):
            raise ValueError(
                f"line {lines[0]} has no target; give every line one,"
                ' {"input": ..., "target": ...}'
            )
        if self.targets and task not in ("causal-lm", "seq2seq"):
            raise ValueError(
                f"the lines have targets, and {task} has none; pass lines with"
                ' {"text": ..., "label": ...}, or another --task'
            )
        if masked and tokenizer.mask_token_id is None:
            raise ValueError(
                "the tokenizer has no mask token; masked-lm is for models such as BERT, pass"
                " another --task"
            )
        self.tokenizer, self.examples, self.labels = tokenizer, examples, labels
        self.batch_size, self.max_length = batch_size, max_length
        self.masked, self.seed, self.first, self.task = masked, seed, first, task

    def __len__(self) -> int:
        return -(-len(self.examples) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        window = self.batch_size * _WINDOW
        for start in range(0, len(self.examples), window):
            numbers = range(start, min(start + window, len(self.examples)))
            order = sorted(numbers, key=lambda number: len(self.examples[number].text))
            for low in range(0, len(order), self.batch_size):
                yield self._batch(order[low : low + self.batch_size])

    def _batch(self, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        chosen = [self.examples[number] for number in numbers]
        if self.targets:
            return self._with_targets(chosen, numbers)
        pairs = [example.pair for example in chosen]
        texts = [example.text for example in chosen]
        encoded = self._encode(
            chosen,
            texts,
            text_pair=[pair or "" for pair in pairs] if any(pairs) else None,
            padding=True,
            padding_side="right",
            return_attention_mask=True,
            return_special_tokens_mask=self.masked,
            return_tensors="pt",
        )
        batch = dict(encoded)
        batch[NUMBERS] = torch.tensor(
            [self.first + number for number in numbers], dtype=torch.int64, device="cpu"
        )
        if self.masked:
            self._mask(batch, batch[NUMBERS].tolist())
        if self.labels is not None:
            batch["labels"] = torch.tensor(
                [self.labels[number] for number in numbers], dtype=torch.int64, device="cpu"
            )
        return batch

    def _encode(self, chosen: Sequence[Example], texts: list[str], **options: Any) -> Any:
        try:
            return self.tokenizer(texts, truncation=True, max_length=self.max_length, **options)
        except Exception as error:  # tokenizers raises Exception itself
            lines = sorted(example.line for example in chosen)
            raise ValueError(
                f"the tokenizer cannot take the texts of lines {lines[0]} to {lines[-1]}"
                f" ({str(error)[:200]})"
            ) from error

    def _with_targets(
        self, chosen: Sequence[Example], numbers: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        """The targets' tokens are the labels: a decoder reads both texts, one after the other, and
        its labels leave the first out.
        """
        apart = self.task == "seq2seq"
        sources = self._encode(chosen, [each.text for each in chosen])["input_ids"]
        targets = self._encode(
            chosen, [each.target or "" for each in chosen], add_special_tokens=apart
        )["input_ids"]
        end = self.tokenizer.eos_token_id
        rows, labels = [], []
        for source, target in zip(sources, targets, strict=True):
            source = source[:-1] if not apart and source and source[-1] == end else source
            if end is not None and (not target or target[-1] != end):
                target = [*target, end]
            row = source if apart else [*source, *target]
            rows.append(row[: self.max_length])
            own = target if apart else [*[_IGNORED] * len(source), *target]
            labels.append(own[: self.max_length])
        return {
            "input_ids": _padded(rows, self.tokenizer.pad_token_id),
            "attention_mask": _padded([[1] * len(row) for row in rows], 0),
            "labels": _padded(labels, _IGNORED),
            NUMBERS: torch.tensor(
                [self.first + number for number in numbers], dtype=torch.int64, device="cpu"
            ),
        }

    def _mask(self, batch: dict[str, torch.Tensor], numbers: Sequence[int]) -> None:
        """Hide 15 % of each text's tokens, at least one; which ones depends on the seed and the
        text's number.
        """
        special = batch.pop("special_tokens_mask").bool()
        labels = torch.full_like(batch["input_ids"], _IGNORED)
        for row, number in enumerate(numbers):
            places = (~special[row]).nonzero().squeeze(1)
            if not len(places):
                continue
            words = f"mask {self.seed} {number}".encode()
            key = int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little")
            generator = torch.Generator().manual_seed(key >> 1)
            count = max(1, round(_MASKED_SHARE * len(places)))
            order = torch.randperm(
                len(places), dtype=torch.int64, device="cpu", generator=generator
            )
            hidden = places[order[:count]]
            labels[row, hidden] = batch["input_ids"][row, hidden]
            batch["input_ids"][row, hidden] = self.tokenizer.mask_token_id
        batch["labels"] = labels


def _padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """(n, longest), filled up on the right."""
    width = max(1, *(len(row) for row in rows))
    full = [[*row, *[value] * (width - len(row))] for row in rows]
    return torch.tensor(full, dtype=torch.int64, device="cpu")
