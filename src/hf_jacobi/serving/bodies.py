"""Checks the fields of a request before anything runs, so that a mistake is answered with one sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from ..decoding.config import JacobiConfig
from ..decoding.errors import UsageError, of_usage
from ..decoding.mixin import DECODINGS


LARGEST = 2**31 - 1  # tokens
SEEDS = (-(2**63), 2**64 - 1)  # the range of torch
LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
OWN = {"decoding", "jacobi"}
NO_SETTINGS = {"transformers_version"}  # what transformers saves beside the settings


def check(body: dict[str, Any], prompt: str, known: set[str]) -> None:
    """
    Checks the fields of a request.

    Args:
        body: the request.
        prompt: the field that holds the prompt: `"messages"`, `"prompt"` or `"input"`.
        known: the names of the settings of a generation config.

    Raises:
        `UsageError`: it names the field, its value and what is expected.
    """
    _check_prompt(body, prompt)
    for name in LENGTHS:
        _check_length(name, body.get(name))
    if not _is_whole(seed := body.get("seed"), *SEEDS):
        raise UsageError(f"`seed` must be a whole number of at most 64 bits, got {_short(seed)}.")
    _check_number(body, "temperature", 0, 100)
    _check_number(body, "top_p", 0, 1, above=True)
    _check_number(body, "frequency_penalty", -1, 2, above=True)
    if not isinstance(body.get("stream"), (bool, type(None))):
        raise UsageError(f"`stream` must be true or false, got {_short(body['stream'])}.")
    _check_stop(body)
    _check_bias(body)
    _check_template_arguments(body)
    _check_config(given_config(body), known)


_EXPECTED = {
    "messages": 'give a list such as [{"role": "user", "content": "..."}]',
    "prompt": "give the text to continue",
    "input": "give the text to answer",
}


def given_config(body: dict[str, Any]) -> dict[str, Any]:
    """The body's `generation_config`, an object or, as `transformers chat` sends it, its JSON text; `{}` if absent."""
    given = body.get("generation_config")
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise UsageError(f"`generation_config` is a string but not JSON ({error}).") from error
    if given is not None and not isinstance(given, dict):
        raise UsageError(f"`generation_config` must be an object of settings, got {_short(given)}.")
    return {name: value for name, value in (given or {}).items() if not name.startswith("_")}


def _check_prompt(body: dict[str, Any], prompt: str) -> None:
    if prompt not in body:
        raise UsageError(f"`{prompt}` is missing: {_EXPECTED[prompt]}.")
    if prompt == "messages":
        _check_messages(body["messages"])
    elif prompt == "prompt" and not (isinstance(body["prompt"], str) and body["prompt"]):
        raise UsageError(f"`prompt` must be text, got {_short(body['prompt'])}.")


def _check_config(given: dict[str, Any], known: set[str]) -> None:
    if unknown := sorted(set(given) - known - OWN - NO_SETTINGS):
        raise UsageError(
            f"`generation_config` has no setting {', '.join(unknown)}: see transformers' GenerationConfig."
        )
    if given.get("decoding") not in (*DECODINGS, None):
        raise UsageError(f"`decoding` must be one of {DECODINGS}, got {_short(given['decoding'])}.")
    JacobiConfig.coerce(given.get("jacobi"))
    _check_length("max_new_tokens", given.get("max_new_tokens"))


def _check_length(name: str, value: Any) -> None:
    if not _is_whole(value, 1, LARGEST):
        raise UsageError(f"`{name}` must be a whole number of at least 1, got {_short(value)}.")


def _check_template_arguments(body: dict[str, Any]) -> None:
    arguments = body.get("chat_template_kwargs")
    if arguments is not None and not isinstance(arguments, Mapping):
        raise UsageError(f"`chat_template_kwargs` must be an object, got {_short(arguments)}.")
    if arguments is None:
        body.pop("chat_template_kwargs", None)


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise UsageError(f"`messages` must be a list of at least one message, got {_short(messages)}.")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UsageError(f"messages[{number}] must be an object with a `role`, got {_short(message)}.")
        content = message.get("content")
        if content is None and not message.get("tool_calls") and message["role"] != "assistant":
            raise UsageError(f"messages[{number}] has no `content`: give it text.")
        parts = content if isinstance(content, list) else []
        if not isinstance(content, (str, list, type(None))) or not all(map(_is_text, parts)):
            raise UsageError(f"messages[{number}]: `content` must be text, got {_short(content)}.")


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _check_number(body: dict, name: str, least: float, most: float, above: bool = False) -> None:
    value = body.get(name)
    if value is None:
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not least <= value <= most or (above and value == least):
        between = f"{'above' if above else 'at least'} {least} and at most {most}"
        raise UsageError(f"`{name}` must be a number, {between}, got {_short(value)}.")


def _check_stop(body: dict) -> None:
    stop = body.get("stop")
    strings = [stop] if isinstance(stop, str) else stop
    if strings is not None and not (
        isinstance(strings, list) and all(isinstance(one, str) and one for one in strings)
    ):
        raise UsageError(f"`stop` must be a string or a list of strings, none of them empty, got {_short(stop)}.")
    if strings == []:
        del body["stop"]


def _check_bias(body: dict) -> None:
    """Also converts the numbers to floats, because transformers accepts no integers."""
    bias = body.get("logit_bias")
    if not bias:
        body.pop("logit_bias", None)
        return
    if not isinstance(bias, dict):
        raise UsageError(f"`logit_bias` must be an object from token ids to numbers, got {_short(bias)}.")
    with of_usage(TypeError, ValueError):
        body["logit_bias"] = {str(int(token)): float(value) for token, value in bias.items()}


def _is_whole(value: Any, least: int, most: int) -> bool:
    """Whether a value is absent, or a whole number in a range."""
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and least <= value <= most)


def _short(value: Any) -> str:
    return f"{value!r:.80}"
