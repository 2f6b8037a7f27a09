"""Prompts become token ids: text as it is, messages through the tokenizer's chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from numbers import Integral
from typing import Any

from ..decoding.errors import UsageError


# What decides the form of the result, and so is not for whoever hands settings to the template.
FORM = (
    "tokenize",
    "add_generation_prompt",
    "continue_final_message",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
)


class BadPrompt(UsageError):
    """
    What is wrong with one prompt; the others may be right.

    Args:
        reason: a sentence.
        count: under which name the report counts it.
    """

    def __init__(self, reason: str, count: str = "bad_prompts"):
        super().__init__(reason)
        self.count = count


def encode_text(tokenizer, text: str) -> list[int]:
    """
    The tokens of a text, with those that the tokenizer puts before a text, such as the beginning token, but not a
    second time: a text that a chat template rendered has them already. What it puts after a text is left out.

    Args:
        tokenizer: the tokenizer.
        text: the text.
    """
    plain = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    special = list(tokenizer(text)["input_ids"])
    starts = range(len(special) - len(plain), -1, -1)
    start = next((start for start in starts if special[start : start + len(plain)] == plain), None)
    if start is None:  # a tokenizer that does not put its own around what is there
        return special
    before = special[:start]
    there = next(count for count in range(start, -1, -1) if before[start - count :] == plain[:count])
    return before + plain[there:]


def encode_messages(tokenizer, messages: list[dict], tools: list | None = None, settings: Mapping | None = None):
    """
    The tokens of a conversation and of the beginning of the answer, as the chat template has them.

    Args:
        tokenizer: the tokenizer, with a chat template.
        messages: the messages.
        tools: the tools that the template tells the model of.
        settings: further arguments of the template, such as `{"enable_thinking": False}`.

    Returns:
        `list[int]`.
    """
    settings = check_settings(settings)
    if tools:
        settings["tools"] = tools
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, **settings)
    return list(encoded["input_ids"])


def check_settings(settings: Any) -> dict[str, Any]:
    """The settings, a copy; `UsageError` where they are no dictionary, or would change more than the text."""
    settings = {} if settings is None else settings
    if not isinstance(settings, Mapping) or not all(isinstance(name, str) for name in settings):
        raise UsageError(f"`chat_template_kwargs` must be a dictionary of settings, got {settings!r:.80}.")
    if odd := [name for name in settings if name in FORM]:
        raise UsageError(f"`chat_template_kwargs` are for the text that the template makes: drop {', '.join(odd)}.")
    return dict(settings)


def refuse_unknown_settings(tokenizer, settings: Mapping[str, Any] | None) -> None:
    """
    Raises `UsageError` for settings that the chat template does not name, as with a letter too few: templates pass
    over them without a word.
    """
    template = getattr(tokenizer, "chat_template", None)
    if not settings or not template or "chat_template" in settings:
        return
    text = template if isinstance(template, str) else json.dumps(template)
    if odd := [name for name in settings if not re.search(rf"\b{re.escape(name)}\b", text)]:
        raise UsageError(f"the chat template of the tokenizer has no setting {', '.join(odd)}: leave it out.")


def without_nulls(value: Any) -> Any:
    """Without what Arrow fills in so that all rows have the same keys: the entries of dictionaries that are `None`."""
    if isinstance(value, Mapping):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, (list, tuple)):
        return [without_nulls(entry) for entry in value]
    return value


def from_json(name: str, value: Any) -> Any:
    """A column that may hold JSON as text, as data sets do whose rows have tools of different shapes."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError:
        raise BadPrompt(f"its {name} are text, but no JSON: {value!r:.60}") from None


def token_ids(value: Any) -> list[int] | None:
    """The ids of a prompt that is given so, a list or an array of whole numbers; `None` if it is something else."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, (list, tuple)) or not value:
        return None
    whole = all(isinstance(token, Integral) and not isinstance(token, bool) for token in value)
    return [int(token) for token in value] if whole else None
