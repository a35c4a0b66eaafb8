"""The tokens and ids of a model folder, from its tokenizer's files, without a tokenizer library."""

from __future__ import annotations

import functools
import hashlib
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymerge.checkpoint.files import MAX_TOKENIZER, exists, parse_object, read_file
from pymerge.errors import CheckpointError

_PIECES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_NUMBER = re.compile(rb":\s*(\d+)")
_MOST_TOKENS = 1 << 22  # entries, or lines, of one file; the largest vocabularies have a million
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_DIGITS = 10  # of the largest id; longer text is not converted to a number


@dataclass(frozen=True)
class AddedToken:
    """A token that was added to a trained vocabulary, with the flags by which a tokenizer finds it
    in a text.
    """

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False


class Tokens:
    """A tokenizer's tokens and their ids, which are the rows of the embedding.

    Parsed when first asked for, which takes 0.1 s for 150,000 tokens: models that share their files
    never ask.
    """

    def __init__(self, main: Path | None, contents: tuple[bytes, ...], folder: Path) -> None:
        self._main = main
        self._contents = contents
        self._folder = folder

    @property
    def known(self) -> bool:
        """Whether the ids are in a file of a supported format."""
        return self._main is not None

    @property
    def ids(self) -> Mapping[str, int]:
        """All tokens with their ids. Raises CheckpointError for a damaged file, as does `added`."""
        return self._parsed[0]

    @property
    def added(self) -> Mapping[str, AddedToken]:
        """Tokens that were added to the trained vocabulary: special tokens, chat markers."""
        return self._parsed[1]

    @property
    def fast(self) -> bool:
        """Whether the main file is tokenizer.json, the one to which tokens can be added."""
        return self._main is not None and self._main.name == "tokenizer.json"

    def same_pieces(self, other: Tokens) -> bool:
        """Whether both have one SentencePiece file and the same added tokens beside it."""
        return bool(self.pieces) and (self.pieces, self._beside[0]) == (
            other.pieces,
            other._beside[0],
        )

    @property
    def pieces(self) -> str:
        """The hash of a SentencePiece file; "" without one."""
        content = self._contents[3]
        return hashlib.sha256(content).hexdigest() if content else ""

    def fits(self, rows: int) -> bool:
        """Whether every id is below `rows`; rarely has to parse."""
        extra = self._beside[0]
        main = self._contents[0].strip()
        # Every number in a mapping is at least as many as the ids among them.
        few = main.count(b":") <= _MOST_TOKENS
        if few and main.startswith(b"{") and main.endswith(b"}") and b'"Unigram"' not in main:
            numbers = _NUMBER.findall(main)
            if max(map(len, numbers), default=0) <= _DIGITS:
                if max([*map(int, numbers), *extra.values()], default=0) < rows:
                    return True
        return all(number < rows for number in self.ids.values())

    @functools.cached_property
    def _parsed(self) -> tuple[Mapping[str, int], Mapping[str, AddedToken]]:
        ids: dict[str, int] = {}
        added: dict[str, AddedToken] = {}
        if self._main is not None:
            ids, added = _READERS[self._main.name](self._main, self._contents[0])
            beside, flags = self._beside
            for token, number in beside.items():
                ids.setdefault(token, number)
                added.setdefault(token, flags[token])
        return ids, added

    @functools.cached_property
    def _beside(self) -> tuple[Mapping[str, int], Mapping[str, AddedToken]]:
        """Added tokens from the files beside the main one."""
        ids: dict[str, int] = {}
        flags: dict[str, AddedToken] = {}
        config, added = (self._folder / name for name in _BESIDE)
        _add(config, _decoder(config, self._contents[1]), ids, flags)
        extra = _object(added, self._contents[2]) if self._contents[2] else {}
        # A file of an older format, of whose tokens nothing else is known.
        plain = ((_entry(token, {"normalized": False}), number) for token, number in extra.items())
        _add(added, plain, ids, flags)
        return ids, flags


class TokenReader:
    """Reads tokenizers; models with identical files share one `Tokens`."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], Tokens] = {}

    def read(self, folder: Path | None) -> Tokens | None:
        """The tokens of a folder, None where it holds no tokenizer. Raises CheckpointError for an
        unreadable file.

        From tokenizer.json, else vocab.json, else vocab.txt; with the added tokens of
        tokenizer_config.json and added_tokens.json, and the hash of a SentencePiece file.
        """
        if folder is None:
            return None
        main = next(filter(exists, (folder / name for name in _READERS)), None)
        pieces = next(filter(exists, (folder / name for name in _PIECES)), None)
        if main is None and pieces is None:
            return None
        paths = (main, *(folder / name for name in _BESIDE), pieces)
        contents = tuple(
            b"" if p is None or not exists(p) else read_file(p, MAX_TOKENIZER) for p in paths
        )
        key = (None if main is None else main.name, *contents)
        return self._known.setdefault(key, Tokens(main, contents, folder))


def _object(path: Path, content: bytes) -> dict[str, Any]:
    return parse_object(content, path, MAX_TOKENIZER)


def _fast(path: Path, content: bytes) -> tuple[dict[str, int], dict[str, AddedToken]]:
    """The tokens of tokenizer.json: a mapping, or for a unigram model a list of [token, score]."""
    whole = _object(path, content)
    model = whole.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    ids: dict[str, int] = {}
    added: dict[str, AddedToken] = {}
    if isinstance(vocab, list):
        _add(path, ((_first(entry), i) for i, entry in enumerate(vocab)), ids)
    elif isinstance(vocab, dict):
        _add(path, vocab.items(), ids)
    else:
        raise CheckpointError(f"{path}: has no vocabulary; download it again")
    entries = whole.get("added_tokens") or []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise CheckpointError(
            f"{path}: has added_tokens that are not a list of objects; download it again"
        )
    found = ((_entry(entry.get("content"), entry), entry.get("id")) for entry in entries)
    _add(path, found, ids, added)
    return ids, added


def _entry(content: Any, flags: Mapping[str, Any]) -> Any:
    """An added token as its entry describes it; what is no text is left for `_add` to refuse."""
    if not isinstance(content, str):
        return content
    given = {name: bool(flags[name]) for name in _FLAGS if name in flags}
    # Special tokens are looked for in the text as it stands.
    return AddedToken(content, **{"normalized": not given.get("special", False), **given})


def _first(entry: Any) -> Any:
    return entry[0] if isinstance(entry, list) and entry else entry


def _slow(path: Path, content: bytes) -> tuple[dict[str, int], dict[str, AddedToken]]:
    found = _object(path, content)
    ids: dict[str, int] = {}
    # One vocabulary per language, as in speech models: their ids are not rows of one embedding.
    if not all(isinstance(value, dict) for value in found.values()):
        _add(path, found.items(), ids)
    return ids, {}


def _lines(path: Path, content: bytes) -> tuple[dict[str, int], dict[str, AddedToken]]:
    if content.count(b"\n") > _MOST_TOKENS:
        raise CheckpointError(f"{path}: has more than {_MOST_TOKENS} lines; download it again")
    try:
        lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path}: is not UTF-8 text ({error.reason}); download it again"
        ) from None
    return {line.rstrip("\r"): i for i, line in enumerate(lines) if line}, {}


_READERS = {"tokenizer.json": _fast, "vocab.json": _slow, "vocab.txt": _lines}
_BESIDE = ("tokenizer_config.json", "added_tokens.json")
FILES = (*_READERS, *_BESIDE, *_PIECES)  # whatever `TokenReader` may read of a folder


def _decoder(path: Path, content: bytes) -> Iterable[tuple[Any, Any]]:
    """The tokens of added_tokens_decoder in tokenizer_config.json: {"32000": {"content": ...}}."""
    entries = _object(path, content).get("added_tokens_decoder") if content else None
    for number, entry in entries.items() if isinstance(entries, dict) else ():
        plain = number.isdecimal() and len(number) <= _DIGITS
        flags = entry if isinstance(entry, dict) else {"content": entry}
        yield _entry(flags.get("content"), flags), int(number) if plain else number


def _add(
    path: Path,
    found: Iterable[tuple[Any, Any]],
    ids: dict[str, int],
    added: dict[str, AddedToken] | None = None,
) -> None:
    """Add (token, id) pairs; a repeated token keeps its last id. Tokens that were there before keep
    theirs. added: receives the tokens that are `AddedToken`s.
    """
    checked: dict[str, int] = {}
    for each, number in found:
        token = each.content if isinstance(each, AddedToken) else each
        if not isinstance(token, str) or type(number) is not int or not 0 <= number < 1 << 31:
            raise CheckpointError(
                f"{path}: gives token {_short(token)} the id {_short(number)}; download it again"
            )
        checked[token] = number
        if added is not None and isinstance(each, AddedToken):
            added.setdefault(token, each)
    for token, number in checked.items():
        ids.setdefault(token, number)


def _short(value: Any) -> str:
    """The beginning of a value's repr."""
    return reprlib.repr(value[:24] if isinstance(value, str) else value)[:60]
