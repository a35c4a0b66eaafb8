"""Tokenizers of the usual kinds, trained on a few sentences: byte-level BPE as of Qwen and Llama 3, BPE
with byte fallback as of Llama 2, Unigram, WordPiece.
"""

from __future__ import annotations

import functools
import json
from typing import Any

CORPUS = [
    "the merged model keeps the words of every model",
    "a tokenizer splits words into parts, and parts into bytes",
    "models that were fine-tuned add tokens of their own: <|im_start|>",
    "naïve café 12345 über straße",
] * 4


@functools.cache
def trained(kind: str) -> str:
    """A tokenizer.json; training is not the same twice."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    if kind in ("qwen", "llama3"):
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=330,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=[] if kind == "qwen" else ["<s>"],
            show_progress=False,
        )
    elif kind == "llama2":
        made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=special, show_progress=False)
    elif kind == "unigram":
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=90,
            special_tokens=["<s>", "</s>", "<unk>"],
            unk_token="<unk>",
            show_progress=False,
        )
    else:
        made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.normalizer = normalizers.BertNormalizer(lowercase=True)
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece()
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        trainer = trainers.WordPieceTrainer(
            vocab_size=150, special_tokens=special, show_progress=False
        )
    made.train_from_iterator(CORPUS, trainer)
    if kind == "llama2":  # bytes are pieces, not added tokens
        content = json.loads(made.to_str())
        content["added_tokens"] = content["added_tokens"][:3]
        return json.dumps(content)
    return str(made.to_str())


def tokenizer(kind: str, added: list[Any]) -> Any:
    """A tokenizer as transformers has it. added: text, or AddedToken."""
    import transformers
    from tokenizers import Tokenizer

    made = Tokenizer.from_str(trained(kind))
    if kind == "qwen":
        found = transformers.PreTrainedTokenizerFast(tokenizer_object=made)
        found.add_special_tokens({"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"})
    elif kind == "llama3":
        found = transformers.PreTrainedTokenizerFast(
            tokenizer_object=made, bos_token="<s>", eos_token="<s>"
        )
    elif kind == "llama2":
        found = transformers.PreTrainedTokenizerFast(
            tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )
    elif kind == "unigram":
        found = transformers.PreTrainedTokenizerFast(
            tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )
    else:
        found = transformers.PreTrainedTokenizerFast(
            tokenizer_object=made,
            unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", mask_token="[MASK]",
        )  # fmt: skip
    found.add_tokens(added)
    return found
