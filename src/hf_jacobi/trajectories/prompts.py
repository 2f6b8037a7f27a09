"""
Reads prompts from data sets and files of any common shape, and turns them into token ids.

`trl.data_utils` does not serve here: it stops at the first row that it cannot convert, where a row is skipped here
and the reason counted, and it does not read tools, settings of the template, or conversations given as JSON.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset, load_from_disk
from datasets.data_files import DataFilesList, get_data_patterns

from ..decoding.errors import MissingFile, UsageError
from .encoding import BadPrompt, check_settings, encode_messages, encode_text, from_json, token_ids, without_nulls
from .shards import SETTINGS, check_file, check_own_file, read_settings
from .sources import BUILDERS, path_of


PROMPT_COLUMNS = (
    "messages",
    "conversations",
    "prompt",
    "question",
    "instruction",
    "text",
    "prompt_ids",
    "input_ids",
)
MESSAGE_COLUMNS = PROMPT_COLUMNS[:2]
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")  # arguments of the template, besides the messages
ID_COLUMNS = ("prompt_id", "id", "data_id", "task_id", "question_id")
BYTE_ORDER_MARK = "\ufeff"  # some editors put it at the beginning of a file
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}  # ShareGPT's names


@dataclass
class Prompt:
    """
    A prompt.

    Attributes:
        number: its place in the data set.
        name: its identifier: the row's own id if it has one, else its number.
        ids: its tokens.
        completion: its completion, if the row gives one.
        refused: why the completion is left out, if it is.
    """

    number: int
    name: str
    ids: list[int]
    completion: list[int] = field(default_factory=list)
    refused: str = ""


def open_prompts(source, split: str | None = None, name: str | None = None) -> Iterable[dict[str, Any]]:
    """
    Opens a source of prompts as rows.

    Args:
        source: a `datasets` data set, a list of rows, strings, conversations or token ids, the path of a JSON, JSONL,
            Parquet, CSV or text file (one prompt per line), a folder of `save_to_disk` or of such files, or a
            data set on the Hub.
        split: of a folder or of a data set on the Hub; `"train"` if left out.
        name: the configuration of a data set on the Hub.

    Raises:
        `ValueError`: the source is none of these, or cannot be read; the message names the file, and the row if one is
            at fault.
        `OSError`: there is no such file.
    """
    if isinstance(source, (Dataset, IterableDataset)):
        return source
    if isinstance(source, (str, Path)):
        return _open_path(str(source), split or "train", name)
    if isinstance(source, Mapping) and source:
        if any(key in PROMPT_COLUMNS for key in source):
            raise UsageError(
                f"`dataset` is a dictionary of columns, {list(source)}: use Dataset.from_dict, or pass rows."
            )
        raise UsageError(f"`dataset` has several splits, {list(source)}: pass one of them, as in dataset['train'].")
    if isinstance(source, Iterable) and not isinstance(source, Mapping):
        rows = list(source)
        if (odd := next((row for row in rows if _is_no_prompt(row)), None)) is not None:
            raise UsageError(f"`dataset` must be a list of texts or of rows with columns, but holds {odd!r:.80}.")
        return [row if isinstance(row, dict) else {"prompt": row} for row in rows]
    raise UsageError(f"`dataset` must be a data set, a list of prompts or a path, got {type(source).__name__}.")


def _is_no_prompt(row: Any) -> bool:
    return row is not None and not isinstance(row, (dict, str, list, tuple)) and not hasattr(row, "tolist")


def _open_path(source: str, split: str, name: str | None) -> Iterable[dict[str, Any]]:
    path = path_of(source)
    if path.exists() and name:
        raise UsageError(f"{source} is local and has no configurations: drop {name!r}, which is for the Hub.")
    if path.is_file() and split != "train":
        raise UsageError(f"{source} is a file, which has no split {split!r}: leave the split out.")
    if path.is_file() and path.suffix.lower() not in BUILDERS:
        raise UsageError(f"{source}: prompts are read from {', '.join(BUILDERS)} files, not {path.suffix!r} ones.")
    for file in _files_of(path):
        if file.suffix == ".parquet":
            check_own_file(file)
    try:
        if path.is_file():
            return _open_file(path)
        if path.is_dir():
            return _open_folder(path, split)
        return load_dataset(source, name, split=split)
    except UsageError:
        raise
    except Exception as error:  # any error of `datasets`: only the input can be at fault here
        if _holds_no_rows(path, error):
            raise UsageError(f"{source} holds no {_kind_of_rows(path)}.") from error
        kind = MissingFile if isinstance(error, OSError) else UsageError
        for file in _files_of(path):
            _name_damage(file)
        where = source if path.exists() else f"there is no file or folder {source} here, and on the Hub it"
        raise kind(f"{where} could not be read: {_reason(error)}") from error


def _open_file(path: Path) -> Dataset:
    kind = BUILDERS[path.suffix.lower()]
    if not path.stat().st_size or (kind == "json" and not _holds_text(path)):
        raise UsageError(f"{path} is empty: it holds no rows.")
    # Absolute, because the folder that `datasets` puts before a relative path can hold `[`, too.
    return load_dataset(kind, data_files=glob.escape(os.path.abspath(path)), split="train")


def _holds_text(path: Path) -> bool:
    """Whether a file holds anything but white space."""
    with open(path, "rb") as file:
        return any(line.strip() for line in file)


def _open_folder(path: Path, split: str) -> Dataset:
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        loaded = load_from_disk(str(path))
        if isinstance(loaded, dict) and split not in loaded:
            raise UsageError(f"{path} has no split {split!r}: its splits are {sorted(loaded)}.")
        return loaded[split] if isinstance(loaded, dict) else loaded
    files = _files_of(path)
    if not files:
        if (path / SETTINGS).exists():  # `collect` or `pack` wrote nothing
            raise UsageError(f"{path} holds no {_kind_of_rows(path)}.")
        raise UsageError(f"{path} holds no data: it has no {', '.join(BUILDERS)} files.")
    if not any(glob.has_magic(str(one)) for one in (path.absolute(), path.resolve())):
        return load_dataset(str(path), split=split)
    # `datasets` would take the name for a pattern, so it gets the files instead, in the splits that it finds in them.
    base = glob.escape(os.path.abspath(path))
    kind = Counter(BUILDERS[file.suffix.lower()] for file in files).most_common(1)[0][0]
    splits = {}
    for found, patterns in get_data_patterns(base).items():
        there = DataFilesList.from_patterns(patterns, base_path=base)
        splits[str(found)] = [glob.escape(file) for file in there if BUILDERS.get(Path(file).suffix.lower()) == kind]
    return load_dataset(kind, data_files=splits, split=split)


def _holds_no_rows(path: Path, error: Exception) -> bool:
    """Whether data could not be opened because they have no rows."""
    files = _files_of(path)
    if files and all(file.suffix.lower() == ".parquet" for file in files):
        return not sum(check_file(file) for file in files)
    return "corresponds to no data" in str(error)


def _kind_of_rows(path: Path) -> str:
    """The name of the rows that a file or folder is for."""
    file = (path.parent if path.is_file() else path) / SETTINGS
    kind = read_settings(file).get("kind") if file.exists() else None
    return {"trajectories": "completions", "packed": "training rows"}.get(str(kind), "rows")


def _files_of(path: Path) -> list[Path]:
    """The data files at a path: the file itself, or all files in a folder that are not hidden."""
    if path.is_file():
        return [path]
    found = (Path(folder) / name for folder, _, names in os.walk(path) for name in names)
    shown = (file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts))
    return sorted(file for file in shown if file.suffix.lower() in BUILDERS)


def _name_damage(path: Path) -> None:
    """Raises `UsageError` if this one file cannot be read, naming it and the row if one is at fault."""
    if path.suffix.lower() == ".parquet":
        check_file(path)
    elif path.suffix.lower() in (".json", ".jsonl"):
        _check_json(path)
    try:
        _open_file(path)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{path} could not be read: {_reason(error)}") from error


def _check_json(path: Path) -> None:
    with open(path, "rb") as file:
        if file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            return  # `datasets` itself reports where an array breaks
        file.seek(0)
        if _is_one_object(file.read()):
            raise UsageError(f"{path} holds one JSON object over several lines: write one per line, or an array.")
        file.seek(0)
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line.decode("utf-8-sig")) if line.strip() else {}
            except ValueError as error:
                raise UsageError(f"{path}, line {number} is not JSON: {error}.") from None
            if not isinstance(row, dict):
                raise UsageError(f"{path}, line {number} is not an object with columns: {row!r:.60}.")


def _is_one_object(content: bytes) -> bool:
    try:
        return b"\n" in content.strip() and isinstance(json.loads(content.decode("utf-8-sig")), dict)
    except ValueError:
        return False


def _reason(error: BaseException) -> str:
    """The message of an error's cause or of the error itself, else its type."""
    chain = [error.__cause__, error.__context__, error]
    return next((str(one).strip() for one in chain if one is not None and str(one).strip()), type(error).__name__)


def only_prompts(rows, column: str | None, *others: str):
    """
    Selects the columns of a data set that hold prompts and their names, and those of `others` that exist; the rest may
    be costly to decode.
    """
    if not isinstance(rows, (Dataset, IterableDataset)):
        return rows
    rows = rows.with_format(None)
    known = (*PROMPT_COLUMNS, *TEMPLATE_COLUMNS, *ID_COLUMNS, column, *others)
    wanted = [name for name in rows.column_names or () if name in known]
    return rows.select_columns(wanted) if wanted else rows


def prompt_column(row: dict[str, Any], column: str | None) -> str:
    """
    The column that prompts are read from: `column`, or the first existing one of `PROMPT_COLUMNS`.

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


def is_text(row: dict[str, Any], column: str | None) -> bool:
    """Whether the prompt of a row is plain text rather than messages or tokens."""
    try:
        found = prompt_column(row, column)
    except UsageError:
        return False
    value = row[found]
    return isinstance(value, str) and not (found in MESSAGE_COLUMNS and isinstance(_messages_of(value), list))


def name_of_prompt(number: int, row: dict[str, Any]) -> str:
    """The identifier of a prompt: the row's own id if it has one, else its number."""
    name = next((str(row[key]) for key in ID_COLUMNS if row.get(key) is not None), str(number))
    return name.encode("utf-8", "replace").decode()


def check_columns(rows: Iterable[dict[str, Any]], column: str | None) -> None:
    """
    Looks for a column of prompts before any work is done: in all rows of a list, else in the first.

    Raises:
        `ValueError`: there is no such column, or no row.
    """
    first = None
    for row in rows:
        first = row if first is None else first
        if column in row or (column is None and any(name in row for name in PROMPT_COLUMNS)):
            return
        if not isinstance(rows, list):  # all rows have the same columns
            break
    if first is None:
        raise UsageError("there are no prompts: the data holds no rows.")
    prompt_column(first, column)  # says what is missing


def encode_prompt(
    number: int,
    row: dict[str, Any],
    column: str | None,
    tokenizer,
    as_chat: bool,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Prompt:
    """
    Turns a row into tokens: messages through the tokenizer's chat template, with the tools and settings of the row;
    text and token ids as they are.

    Args:
        number: the row's place.
        row: the row.
        column: see `prompt_column`.
        tokenizer: the tokenizer.
        as_chat: whether text is a user's message.
        chat_template_kwargs: settings of the template for all rows; a row's own column takes precedence.

    Raises:
        `BadPrompt`: this row has no usable prompt; the message names it.
        `ValueError`: no row can be used with these arguments, for example without a chat template.
    """
    name = name_of_prompt(number, row)
    try:
        found = prompt_column(row, column)
    except UsageError as error:  # other rows may have it
        raise BadPrompt(f"prompt {name}: {str(error).rstrip('.')}") from None
    value = row[found]
    if isinstance(value, str):
        value = value.removeprefix(BYTE_ORDER_MARK)
        if found in MESSAGE_COLUMNS:
            value = _messages_of(value)
    if value is None or (isinstance(value, str) and not value.strip()) or (isinstance(value, list) and not value):
        return Prompt(number, name, [])
    if (ids := token_ids(value)) is not None:
        return Prompt(number, name, ids)
    try:
        _refuse_half_characters([value, row.get("tools")])
        tools, settings = _template_columns(row)
        if isinstance(value, str) and not as_chat:
            if chat_template_kwargs:
                raise UsageError(
                    f"`chat_template_kwargs` are for messages, but prompt {name} is text: leave them out, or treat "
                    "text as a user's message (as_chat)."
                )
            if tools or settings:
                raise BadPrompt("it is text, but has tools or settings for a chat template: use messages, or as_chat")
            return Prompt(number, name, _without_end(encode_text(tokenizer, value), tokenizer))
        messages = [{"role": "user", "content": value}] if isinstance(value, str) else _until_answer(value)
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError(
                "the prompts are messages, but the tokenizer has no chat template: give it one, or use text."
            )
        settings = {**(chat_template_kwargs or {}), **settings}
        return Prompt(number, name, encode_messages(tokenizer, messages, tools, settings))
    except BadPrompt as error:
        raise BadPrompt(f"prompt {name}: {error}") from error
    except UsageError:
        raise
    except Exception as error:  # the template or the tokenizer rejects this prompt
        raise BadPrompt(f"prompt {name}: {type(error).__name__}: {_reason(error).rstrip('.')}") from error


def _messages_of(text: str) -> Any:
    """The messages that a text holds as JSON, as in data sets whose messages differ in keys; else the text."""
    try:
        found = json.loads(text)
    except ValueError:
        return text
    return found if isinstance(found, list) and all(isinstance(one, dict) for one in found) else text


def _template_columns(row: dict[str, Any]) -> tuple[list | None, dict[str, Any]]:
    """A row's tools and template settings, either of which can be JSON."""
    tools, settings = (without_nulls(from_json(key, row.get(key))) for key in TEMPLATE_COLUMNS)
    if isinstance(tools, list):
        tools = [without_nulls(from_json("tools", tool)) for tool in tools]
    if tools is not None and not isinstance(tools, list):
        raise BadPrompt(f"its tools must be a list, got {tools!r:.60}")
    try:
        return tools or None, check_settings(settings)
    except UsageError as error:
        raise BadPrompt(str(error).rstrip(".")) from None


def _refuse_half_characters(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start : error.end]
        raise BadPrompt(f"its text holds half a character, the lone surrogate {half!a}") from None


def _without_end(ids: list[int], tokenizer) -> list[int]:
    """Without a final end-of-sequence token, which a prompt must not have."""
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def _until_answer(messages: Any) -> list[dict[str, Any]]:
    """The messages before the last answer, with the roles and keys that templates expect."""
    if not (isinstance(messages, list) and all(isinstance(message, Mapping) for message in messages)):
        raise BadPrompt(f"a prompt must be text or a list of messages or of token ids, got {messages!r:.80}")
    known = []
    for message in without_nulls(messages):
        role = message.get("role") or message.get("from") or "user"
        content = message["content"] if "content" in message else message.get("value")
        others = {key: value for key, value in message.items() if key not in ("role", "from", "content", "value")}
        known.append({**others, "role": ROLES.get(role, role), "content": _text_of(content)})
    if known[-1]["role"] == "assistant" and len(known) > 1:
        known.pop()
    return known


def _text_of(content: Any) -> str:
    """The text of a message, whose content may come in parts."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = [part for part in content if part is not None] if isinstance(content, list) else [content]
    if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in parts):
        raise BadPrompt(f"a message must be text or parts with a text, got {content!r:.80}")
    return "".join(part["text"] for part in parts)


def digest_of(rows: list[dict[str, Any]], column: str | None, others: Sequence[str] = ()) -> str:
    """
    Returns a digest of the prompts of some rows, by which a resumed run checks that they are unchanged.

    Args:
        rows: the rows.
        column: see `prompt_column`.
        others: further columns to include.
    """
    prompts = []
    for row in rows:
        try:
            value = row[prompt_column(row, column)]
        except UsageError:  # a prompt that is left out
            value = None
        known = [value, [row.get(key) for key in ID_COLUMNS]]
        prompts.append(known + [row[key] for key in (*TEMPLATE_COLUMNS, *others) if row.get(key) is not None])
    text = json.dumps(prompts, default=lambda value: value.tolist() if hasattr(value, "tolist") else str(value))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
