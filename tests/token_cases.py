"""Small models whose tokens have different ids, and what their rows are at the ids of another
tokenizer (docs/spec/rows.md).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from folder_cases import State, family, recipe, write_model

ROWS = 37
TABLES = ("model.embed_tokens.weight", "lm_head.weight")
METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "task_arithmetic": {"lambda": 0.7},
    "ties": {"density": 0.4},
    "dare_ties": {"density": 0.6},
    "breadcrumbs": {"density": 0.6, "gamma": 0.1},
}
WORDS = [f"w{i}" for i in range(ROWS)]
Ids = Mapping[str, int]


def ids_of(words: list[str]) -> dict[str, int]:
    return {word: i for i, word in enumerate(words)}


def shuffled(words: list[str], seed: int) -> list[str]:
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(seed)).tolist()
    return [words[i] for i in order]


# What each of three models' tokens are (base, m1, m2), and how many rows each has beyond.
VOCABULARIES: dict[str, tuple[list[dict[str, int]], list[int]]] = {
    "permuted": ([ids_of(WORDS), ids_of(shuffled(WORDS, 1)), ids_of(WORDS)], [0, 0, 0]),
    "all permuted": ([ids_of(shuffled(WORDS, k)) for k in range(3)], [0, 0, 0]),
    "added to one": ([ids_of(WORDS), ids_of([*WORDS, "<a>", "<b>"]), ids_of(WORDS)], [0, 0, 0]),
    "added to both": (
        [
            ids_of(WORDS),
            ids_of([*WORDS, "<a>", "<d>", "<b>"]),
            ids_of([*WORDS, "<c>", "<a>", "<d>"]),
        ],
        [0, 0, 0],
    ),
    "padded": ([ids_of(WORDS[:20]), ids_of([*WORDS[:20], "<a>"]), ids_of(WORDS[:20])], [3, 7, 0]),
    "renamed": ([ids_of(WORDS), ids_of([*WORDS[:5], "<a>", *WORDS[6:]]), ids_of(WORDS)], [0, 0, 0]),
    "holes": (
        [
            {w: i for w, i in ids_of(WORDS).items() if i not in (3, 4)},
            {w: i for w, i in ids_of(shuffled(WORDS, 2)).items() if i not in (4, 9)},
            {w: i for w, i in ids_of(WORDS).items() if i != 3},
        ],
        [0, 0, 2],
    ),
    "two names": (
        [
            ids_of(WORDS),
            {**ids_of(WORDS), "<a>": 5, "<b>": 6},
            ids_of([*WORDS[:5], "<a>", *WORDS[6:]]),
        ],
        [0, 0, 0],
    ),
}


def write_tokenizer(folder: Path, ids: Ids) -> None:
    added = [{"id": i, "content": t, "special": True} for t, i in ids.items() if t[0] == "<"]
    vocab = {t: i for t, i in ids.items() if t[0] != "<"}
    content = {"added_tokens": added, "model": {"type": "BPE", "vocab": vocab, "merges": []}}
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


def states_of(
    vocabularies: list[dict[str, int]], more: list[int], dtypes: list[torch.dtype]
) -> list[State]:
    """Random models with a row an id, and `more` rows beyond."""
    states = family(len(vocabularies) - 1, torch.float32)
    for k, (ids, extra) in enumerate(zip(vocabularies, more, strict=True)):
        rows = max(ids.values()) + 1 + extra
        for seed, name in enumerate(TABLES):
            generator = torch.Generator().manual_seed(100 * k + seed)
            states[k][name] = torch.randn(rows, 16, generator=generator)
        states[k] = {name: t.to(dtypes[k]) for name, t in states[k].items()}
    return states


def moved(tables: list[torch.Tensor], vocabularies: list[Ids], out: Ids, base: int | None) -> list[torch.Tensor]:  # fmt: skip
    """V1 to V4, a row at a time."""
    count = max(out.values()) + 1
    names: dict[int, list[str]] = {}
    for token, i in out.items():
        names.setdefault(i, []).insert(0, token)
    result = [torch.full((count, *t.shape[1:]), torch.nan) for t in tables]
    for i in range(count):
        rows = []
        for table, ids in zip(tables, vocabularies, strict=True):
            found = [ids[token] for token in names.get(i, []) if token in ids]
            free = i not in names and i not in ids.values()
            at = i if free else next(iter(found), len(table))
            rows.append(table[at].float() if at < len(table) else None)
        having = [row for row in rows if row is not None]
        if not having:
            other = torch.zeros(tables[0].shape[1:])
        elif base is not None and rows[base] is not None:
            other = rows[base]
        else:
            other = sum(having[1:], having[0]) / len(having)
        for k, row in enumerate(rows):
            result[k][i] = other if row is None else row
    wide = torch.float32 if len({t.dtype for t in tables}) > 1 else tables[0].dtype
    return [table.to(wide) for table in result]


def write_both(
    root: Path,
    vocabularies: list[dict[str, int]],
    more: list[int],
    source: int,
    dtypes: list[torch.dtype] | None = None,
) -> tuple[list[Path], list[Path]]:
    """The models as they are, and as they would be with the source's tokenizer."""
    states = states_of(vocabularies, more, dtypes or [torch.bfloat16] * 3)
    folders = [write_model(root / f"m{k}", state) for k, state in enumerate(states)]
    for folder, ids in zip(folders, vocabularies, strict=True):
        write_tokenizer(folder, ids)
    wanted = [dict(state) for state in states]
    for name in TABLES:
        # The base is the last input, whose row comes first all the same.
        tables = [states[k][name] for k in (1, 2, 0)]
        order = [vocabularies[k] for k in (1, 2, 0)]
        for k, table in zip((1, 2, 0), moved(tables, order, vocabularies[source], 2), strict=True):
            wanted[k][name] = table
    return folders, [write_model(root / f"moved{k}", state) for k, state in enumerate(wanted)]


def configured(method: str, folders: list[Path], **more: Any) -> dict[str, Any]:
    config = {**recipe(method, folders, **METHODS[method]), "out_dtype": "float32", **more}
    if method == "linear":
        weights = {"parameters": {"weight": 0.3}}
        config["models"] = [{"model": str(f), **weights} for f in (*folders[1:], folders[0])]
        config["base_model"] = str(folders[0])
    return config


def chosen(folders: list[Path], source: int) -> str:
    return "base" if source == 0 else str(folders[source])
