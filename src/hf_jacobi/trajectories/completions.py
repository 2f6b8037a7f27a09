"""Reads the completion of a row and turns it into tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..decoding.errors import UsageError
from .encoding import BadPrompt, token_ids


COMPLETION_COLUMNS = ("completion_ids", "completion")
END_COLUMNS = ("finish_reason", "ended")  # say whether a completion given as text is complete
CUT = ("length", "max_tokens")  # engines' finish reasons for a text without an end


def check_completions(row: dict[str, Any]) -> None:
    """Raises `UsageError` for rows without a column of completions."""
    if not any(name in row for name in COMPLETION_COLUMNS):
        raise UsageError(
            f"`completions` need a column `completion` (text) or `completion_ids` (tokens): the columns are "
            f"{sorted(row)}."
        )


def encode_completion(name: str, row: dict[str, Any], tokenizer, eos_tokens: list[int], longest: int) -> list[int]:
    """
    Returns the tokens of a row's completion, up to its end of text and at most `longest`.

    Text is encoded without the prompt before it. Engines omit the end-of-sequence token from text, so it is added
    unless `finish_reason` is one of `CUT` or `ended` is false. Tokens are used unchanged.

    Args:
        name: the prompt's name, for errors.
        row: the row.
        tokenizer: the tokenizer.
        eos_tokens: the end-of-sequence tokens of the model.
        longest: maximum tokens of a completion.

    Raises:
        `BadPrompt`: the row has no completion, or one that is neither text nor tokens.
    """
    given = row.get("completion_ids")
    value: Any = row.get("completion") if given is None else given
    value = value.tolist() if hasattr(value, "tolist") else value
    if value is None:
        raise BadPrompt(f"prompt {name} has no completion")
    tokens = [] if value == [] else token_ids(value)
    if tokens is None:
        text = _text_of(name, value)
        try:
            tokens = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        except Exception as error:  # the tokenizer rejects this text
            raise BadPrompt(f"the completion of prompt {name}: {type(error).__name__}: {error}") from error
        if _has_end(row) and not (tokens and tokens[-1] in eos_tokens):
            own = getattr(tokenizer, "eos_token_id", None)
            tokens += [own] if own in eos_tokens else eos_tokens[:1]
    end = next((place + 1 for place, token in enumerate(tokens) if token in eos_tokens), len(tokens))
    return tokens[: min(end, longest)]


def _has_end(row: dict[str, Any]) -> bool:
    is_cut = str(row.get("finish_reason")).lower() in CUT
    return not is_cut and str(row.get("ended")).lower() not in (
        "false",
        "0",
    )  # CSV holds text


def _text_of(name: str, value: Any) -> str:
    """The text of a completion, which can be a conversation of one message."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], Mapping):
        value = value[0].get("content")
    if not isinstance(value, str):
        raise BadPrompt(f"the completion of prompt {name} must be text or a list of token ids, got {value!r:.60}")
    return value
