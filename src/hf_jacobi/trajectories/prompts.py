"""Where prompts come from: data sets and files of any common shape, turned into token ids."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset, load_from_disk

from ..decoding.errors import MissingFile, UsageError


BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".txt": "text",
    ".text": "text",
}
PROMPT_COLUMNS = ("messages", "conversations", "prompt", "question", "instruction", "text")
ID_COLUMNS = ("prompt_id", "id", "data_id", "task_id", "question_id")
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}  # ShareGPT's names


@dataclass
class Prompt:
    """
    A prompt.

    Attributes:
        number: its place in the data set.
        name: what identifies it: the row's own id if it has one, else its number.
        ids: its tokens.
    """

    number: int
    name: str
    ids: list[int]


def open_prompts(source, split: str | None = None, name: str | None = None) -> Iterable[dict[str, Any]]:
    """
    Rows of prompts.

    Args:
        source: a `datasets` data set, a list of rows or of strings, the path of a JSON, JSONL, Parquet, CSV or text
            file (one prompt a line), a folder that `save_to_disk` or Parquet files made, or a data set on the Hub.
        split: of a folder or of a data set on the Hub; `"train"` if left out.
        name: the configuration of a data set on the Hub.

    Raises:
        `ValueError`: the source is none of these.
        `OSError`: there is no such file.
    """
    if isinstance(source, (Dataset, IterableDataset)):
        return source
    if isinstance(source, (str, Path)):
        return _open_path(str(source), split or "train", name)
    if isinstance(source, Iterable) and not isinstance(source, dict):
        rows = [{"prompt": row} if row is None or isinstance(row, str) else row for row in source]
        if odd := next((row for row in rows if not isinstance(row, dict)), None):
            raise UsageError(f"`dataset` must be a list of texts or of rows with columns, it holds {odd!r:.80}.")
        return rows
    if isinstance(source, dict) and source:
        raise UsageError(f"`dataset` has several splits, {list(source)}: pass one of them, as in dataset['train'].")
    raise UsageError(f"`dataset` must be a data set, a list of prompts or a path, got {type(source).__name__}.")


def _open_path(source: str, split: str, name: str | None) -> Iterable[dict[str, Any]]:
    path = Path(source).expanduser()
    if path.is_file() and path.suffix not in BUILDERS:
        raise UsageError(f"{source}: prompts are read from {', '.join(BUILDERS)} files, not {path.suffix!r} ones.")
    if not path.exists() and (source.startswith(("/", ".", "~")) or path.suffix in BUILDERS):
        raise MissingFile(f"there is no file or folder {source}.")
    try:
        if path.is_file():
            return load_dataset(BUILDERS[path.suffix], data_files=glob.escape(str(path)), split="train")
        if path.is_dir():
            if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
                loaded = load_from_disk(str(path))
                return loaded[split] if isinstance(loaded, dict) else loaded
            return load_dataset(str(path), split=split)
        return load_dataset(source, name, split=split)
    except (OSError, ValueError):
        raise
    except KeyError:
        raise UsageError(f"{source} has no split {split!r}: its splits are {sorted(loaded)}.") from None
    except Exception as error:  # whatever a builder of `datasets` stumbles over
        raise UsageError(f"{source} could not be read: {error.__cause__ or error or type(error).__name__}") from error


def only_prompts(rows, column: str | None):
    """The columns of a data set that prompts and their names are read from; others may be costly to decode."""
    if not isinstance(rows, (Dataset, IterableDataset)):
        return rows
    rows = rows.with_format(None)
    wanted = [name for name in rows.column_names or () if name in (*PROMPT_COLUMNS, *ID_COLUMNS, column)]
    return rows.select_columns(wanted) if wanted else rows


def prompt_column(row: dict[str, Any], column: str | None) -> str:
    """
    The column that prompts are read from: `column`, or the first of `PROMPT_COLUMNS` that there is.

    Raises:
        `ValueError`: there is none.
    """
    if column is not None and column not in row:
        raise UsageError(f"the data set has no column {column!r}; its columns are {sorted(row)}.")
    there = [name for name in PROMPT_COLUMNS if name in row]
    found = column or next((name for name in there if row[name] is not None), next(iter(there), None))
    if found is None:
        raise UsageError(
            f"none of the columns {sorted(row)} looks like a prompt: name one, or rename it to one of "
            f"{list(PROMPT_COLUMNS)}."
        )
    return found


def encode_prompt(number: int, row: dict[str, Any], column: str | None, tokenizer, as_chat: bool) -> Prompt:
    """
    Turns a row into tokens: messages through the tokenizer's chat template, text as it is.

    Args:
        number: the row's place.
        row: the row.
        column: see `prompt_column`.
        tokenizer: the tokenizer.
        as_chat: whether text is a user's message.

    Raises:
        `ValueError`: the row has no usable prompt, or the tokenizer no chat template for it.
    """
    value = row[prompt_column(row, column)]
    name = next((str(row[key]) for key in ID_COLUMNS if row.get(key) is not None), str(number))
    if value is None or (isinstance(value, str) and not value.strip()):
        return Prompt(number, name, [])
    if isinstance(value, str):
        if not as_chat:
            return Prompt(number, name, _without_end(tokenizer(value)["input_ids"], tokenizer))
        value = [{"role": "user", "content": value}]
    if not (isinstance(value, list) and value and all(isinstance(message, dict) for message in value)):
        raise UsageError(f"prompt {name}: a prompt must be text or a list of messages, got {value!r:.80}.")
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError("the prompts are messages, but the tokenizer has no chat template: give it one, or use text.")
    messages = _until_answer(name, value)
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return Prompt(number, name, list(encoded["input_ids"]))


def _without_end(ids: list[int], tokenizer) -> list[int]:
    """Some tokenizers end every text; a prompt has no end."""
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def _until_answer(name: str, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages before the last answer, with the roles and keys that templates know."""
    known = []
    for message in messages:
        role = message.get("role") or message.get("from") or "user"
        content = message["content"] if message.get("content") is not None else message.get("value")
        others = {key: value for key, value in message.items() if key not in ("role", "from", "content", "value")}
        others = {key: value for key, value in others.items() if value is not None}
        known.append({**others, "role": ROLES.get(role, role), "content": _text_of(name, content)})
    if known[-1]["role"] == "assistant" and len(known) > 1:
        known.pop()
    return known


def _text_of(name: str, content: Any) -> str:
    """The text of a message, whose content may come in parts."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) else [content]
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        raise UsageError(f"prompt {name}: a message must be text or parts with a text, got {content!r:.80}.")
    return "".join(part["text"] for part in parts)


def digest_of(rows: list[dict[str, Any]], column: str | None) -> str:
    """A digest of the prompts of some rows, by which a run that goes on knows that they are still the same."""
    prompts = [(row[prompt_column(row, column)], [row.get(key) for key in ID_COLUMNS]) for row in rows]
    return hashlib.blake2b(json.dumps(prompts, default=str).encode(), digest_size=16).hexdigest()
