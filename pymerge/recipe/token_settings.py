"""The rows that a recipe gives to single tokens: `tokens` of the entry `tokenizer`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pymerge.methods.method import kind_of, short

Reference = TypeVar("Reference")

_KINDS = {"zero": ("kind",), "model_token": ("kind", "model", "token", "token_id")}


@dataclass(frozen=True)
class TokenSetting(Generic[Reference]):
    """Where the row of one token comes from.

    model: the model that gives it, or None. source: the model's token whose row it is, or that
        token's id; None is the token itself. zero: a row of zeros. force: for the models that have
        the token too. Without model and zero the token follows the rule for all tokens.
    """

    model: Reference | None = None
    source: str | int | None = None
    zero: bool = False
    force: bool = False


def parse_token(raw: Any, reference: Callable[[Any], Reference]) -> TokenSetting[Reference]:
    """An entry of `tokens`. reference: parses a model. ValueError with the reason."""
    if raw is None:
        return TokenSetting()
    if not isinstance(raw, Mapping):
        raise ValueError(
            f"{short(raw)} is {kind_of(raw)}; pass a mapping, {{source: a model}} or {{source:"
            " {kind: zero}}"
        )
    _check_keys(raw, ("source", "force"))
    force, source = raw.get("force", False), raw.get("source")
    if not isinstance(force, bool):
        raise ValueError(f"force: {short(force)} is {kind_of(force)}; pass true or false")
    if source is None:
        if force:
            raise ValueError(
                "force needs a source, the row that all models get; add it, or leave force out"
            )
        return TokenSetting()
    if not isinstance(source, Mapping) or "kind" not in source:
        return TokenSetting(reference(source), force=force)
    kind = source["kind"]
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"kind: {short(kind)} is not one of {', '.join(_KINDS)}")
    _check_keys(source, _KINDS[kind])
    if kind == "zero":
        return TokenSetting(zero=True, force=force)
    return TokenSetting(reference(source.get("model")), _token_of(source), force=force)


def _token_of(source: Mapping[str, Any]) -> str | int:
    token, number = source.get("token"), source.get("token_id")
    if (token is None) == (number is None):
        raise ValueError("a source of kind model_token has either token or token_id")
    if number is None:
        if not isinstance(token, str) or not token:
            raise ValueError(f"token: {short(token)} is {kind_of(token)}; pass text")
        return token
    if type(number) is not int or number < 0:
        raise ValueError(f"token_id: {short(number)} is not a whole number from 0 on")
    return number


def _check_keys(raw: Mapping[str, Any], allowed: Collection[str]) -> None:
    for key in raw:
        if key not in allowed:
            near = difflib.get_close_matches(str(key), allowed, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(allowed)}"
            raise ValueError(f"unknown key {short(key)}{hint}")
