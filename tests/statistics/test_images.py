"""Statistics of image classifiers by the command (S7, S8)."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from architecture_cases import PROCESSOR, images, tiny, tokenizer

from pymerge.cli.stats import collect_texts, main
from pymerge.statistics import collect

transformers = pytest.importorskip("transformers")
pytest.importorskip("PIL")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny("ViT", 0).save_pretrained(tmp_path / "model")
    (tmp_path / "model/preprocessor_config.json").write_text(PROCESSOR)
    images(tmp_path / "data", 0)
    return tmp_path


def test_the_command_reads_images_and_their_labels(folder, capsys):
    from PIL import Image

    data = folder / "data/data.jsonl"
    arguments = [str(folder / "model"), str(data), "--out", str(folder / "s"), "--device", "cpu"]
    assert main([*arguments, "--labels", "empirical"]) == 0
    assert "task image-classification, the model is a ViTFor" in capsys.readouterr().err
    found = collect_texts(
        str(folder / "model"), data, out=folder / "s", overwrite=True, labels="empirical",
        device="cpu", batch_size=5,
    )  # fmt: skip
    processor = transformers.AutoImageProcessor.from_pretrained(folder / "model")
    pictures = [Image.open(folder / f"data/{k}.png") for k in range(24)]
    batch = dict(processor(pictures, return_tensors="pt"))
    batch["labels"] = torch.arange(24) % 3
    model = transformers.AutoModelForImageClassification.from_pretrained(folder / "model").eval()
    wanted = collect(model, [batch], loss="image-classification", labels="empirical")
    for layer in wanted.layers:
        for kind in ("input_gram", "output_grad_gram"):
            gram = getattr(found, kind)(layer)
            torch.testing.assert_close(gram, getattr(wanted, kind)(layer), rtol=1e-3, atol=1e-6)
    assert found.counts("vit.embeddings.patch_embeddings.projection").tokens == 24 * 16


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"image": "gone.png"}, r"line 2: .*gone\.png"),
        ({"image": "data.jsonl"}, r"line 2: .*data\.jsonl is no image that pillow reads"),
        ({"image": "."}, r"line 2: .*data is a folder"),
        ({"text": "a cat"}, "line 2 has no image, and the model classifies images"),
        ({"image": "0.png", "label": "dog"}, "line 2 has label 'dog'; the model knows 'LABEL_0'"),
        ({"image": "0.png"}, "line 2 has no label"),
    ],
)
def test_lines_that_cannot_be_used_are_named(folder, line, message):
    data = folder / "data/data.jsonl"
    first = data.read_text().splitlines()[0]
    data.write_text(f"{first}\n{json.dumps(line)}\n")
    labels = "empirical" if "label" in message else "true"
    with pytest.raises(ValueError, match=message):
        collect_texts(str(folder / "model"), data, out=folder / "s", labels=labels, device="cpu")
    assert not (folder / "s").exists()


@pytest.mark.parametrize("raised", [NotImplementedError, EOFError, IndexError, struct.error])
def test_whatever_pillow_says_of_a_file_names_it(folder, monkeypatch, raised):
    """Its formats raise many kinds of errors for damaged files."""
    from PIL import Image

    def convert(self, mode):
        raise raised("odd")

    monkeypatch.setattr(Image.Image, "convert", convert)
    with pytest.raises(ValueError, match=r"line 1: .*0\.png is no image that pillow reads \(odd\)"):
        collect_texts(
            str(folder / "model"), folder / "data/data.jsonl", out=folder / "s", device="cpu"
        )


def test_images_for_a_model_of_texts_and_a_model_without_a_processor(folder):
    data = folder / "data/data.jsonl"
    (folder / "model/preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="no image processor that transformers can load"):
        collect_texts(str(folder / "model"), data, out=folder / "s", device="cpu")
    tiny("BERT", 0).save_pretrained(folder / "texts")
    tokenizer().save_pretrained(folder / "texts")
    with pytest.raises(ValueError, match="line 1 has an image, and sequence-classification reads"):
        collect_texts(str(folder / "texts"), data, out=folder / "s", device="cpu")
