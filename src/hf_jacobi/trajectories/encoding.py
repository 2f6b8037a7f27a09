"""Turns prompts into token ids: text directly, messages through the tokenizer's chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from numbers import Integral
from typing import Any

from ..decoding.errors import UsageError


# Arguments that decide the form of the result; settings for the template must not change them.
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
    One prompt cannot be used; others may be fine.

    Args:
        reason: a sentence.
        count: the name under which the report counts it.
    """

    def __init__(self, reason: str, count: str = "bad_prompts"):
        super().__init__(reason)
        self.count = count


def encode_text(tokenizer, text: str) -> list[int]:
    """
    Returns the tokens of a text, after the special tokens that the tokenizer adds before a text, such as the beginning
    token. Those that the text already starts with, as a chat template renders them, are not repeated. Tokens that the
    tokenizer adds after a text are left out.

    Args:
        tokenizer: the tokenizer.
        text: the text.
    """
    plain = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    special = list(tokenizer(text)["input_ids"])
    starts = range(len(special) - len(plain), -1, -1)
    start = next((start for start in starts if special[start : start + len(plain)] == plain), None)
    if start is None:  # the tokenizer does not simply add tokens around the text
        return special
    before = special[:start]
    there = next(count for count in range(start, -1, -1) if before[start - count :] == plain[:count])
    return before + plain[there:]


def encode_messages(tokenizer, messages: list[dict], tools: list | None = None, settings: Mapping | None = None):
    """
    Returns the tokens of a conversation and of the beginning of the answer, as the chat template renders them.

    Args:
        tokenizer: the tokenizer, with a chat template.
        messages: the messages.
        tools: the tools that the template describes to the model.
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
    """Returns a copy of the settings; raises `UsageError` unless they are a dictionary that changes only the text."""
    settings = {} if settings is None else settings
    if not isinstance(settings, Mapping) or not all(isinstance(name, str) for name in settings):
        raise UsageError(f"`chat_template_kwargs` must be a dictionary of settings, got {settings!r:.80}.")
    if odd := [name for name in settings if name in FORM]:
        raise UsageError(f"`chat_template_kwargs` must change only the text of the template: drop {', '.join(odd)}.")
    return dict(settings)


def refuse_unknown_settings(tokenizer, settings: Mapping[str, Any] | None) -> None:
    """
    Raises `UsageError` for settings that the chat template does not name, such as misspelled ones: templates ignore
    them silently.
    """
    template = getattr(tokenizer, "chat_template", None)
    if not settings or not template or "chat_template" in settings:
        return
    text = template if isinstance(template, str) else json.dumps(template)
    if odd := [name for name in settings if not re.search(rf"\b{re.escape(name)}\b", text)]:
        raise UsageError(f"the chat template of the tokenizer has no setting {', '.join(odd)}: leave it out.")


def without_nulls(value: Any) -> Any:
    """Drops dictionary entries that are `None`, which Arrow adds so that all rows have the same keys."""
    if isinstance(value, Mapping):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, (list, tuple)):
        return [without_nulls(entry) for entry in value]
    return value


def from_json(name: str, value: Any) -> Any:
    """Parses a column that may hold JSON as text, as in data sets whose rows have tools of different shapes."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError:
        raise BadPrompt(f"its {name} are text, but not JSON: {value!r:.60}") from None


def token_ids(value: Any) -> list[int] | None:
    """The ids of a prompt given as a list or an array of whole numbers; `None` for anything else."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, (list, tuple)) or not value:
        return None
    whole = all(isinstance(token, Integral) and not isinstance(token, bool) for token in value)
    return [int(token) for token in value] if whole else None
