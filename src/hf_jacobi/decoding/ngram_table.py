"""A table of n-grams from text that the model wrote before: what usually follows the last tokens of a text."""

from __future__ import annotations

import functools
import re
import time
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path

from .errors import MissingFile, UsageError


TABLE = "ngrams.npz"  # not .safetensors: engines read every such file of a checkpoint as weights
PLACE = "hf_jacobi_checkpoint"  # an attribute of a model
FORMAT = 1
PATIENCE = 600.0
LEVELS = 16  # steps of a chance
LONGEST = 8  # the largest number of tokens of a context
MULTIPLIER = 0x5851F42D4C957F2D  # of Knuth's 64-bit generator MMIX
MASK = (1 << 63) - 1


def key_of(context: Sequence[int]) -> int:
    """The key of a context in a table: 63 bits that depend on its tokens and their number."""
    key = len(context)
    for token in context:
        key = (key * MULTIPLIER + token + 1) & MASK
    return key


def chance_of(level: int) -> float:
    """The middle of the chances of a level."""
    return (level + 0.5) / LEVELS


class NgramTable:
    """
    The token that most often followed each context, and how likely it is. `build_ngram_table` writes such a table.

    A guess costs no forward, unlike those of a draft model, and one or two of them are often correct. This is drafting
    from a store of earlier text (He et al., "REST", arXiv 2311.08252) and from n-grams of the model's own text
    (Stewart et al., "The N-Grammys", arXiv 2411.03786).

    Args:
        keys: the key of each context (`key_of`), in rising order.
        tokens: the token after it.
        levels: the chance of this token, in steps of 1 / `LEVELS`, rounded down.
        order: the length of the longest context.
    """

    def __init__(self, keys: Sequence[int], tokens: Sequence[int], levels: Sequence[int], order: int):
        self.keys, self.tokens, self.levels, self.order = keys, tokens, levels, order

    def __len__(self) -> int:
        return len(self.keys)

    def next(self, text: Sequence[int]) -> tuple[int, int] | None:
        """`(token, level)` after the longest context of the table with which a text ends; `None` without one."""
        for length in range(min(self.order, len(text)), 0, -1):
            key = key_of(text[-length:])
            place = bisect_left(self.keys, key)
            if place < len(self.keys) and self.keys[place] == key:
                return self.tokens[place], self.levels[place]
        return None

    @classmethod
    def read(cls, file: Path, vocabulary: int | None = None) -> NgramTable:
        """
        Reads a table.

        Args:
            file: the file.
            vocabulary: the number of tokens of the model that will use it, if known.

        Raises:
            `UsageError`: it is not such a table, or one for another tokenizer.
        """
        table, tokens = _read(str(file), file.stat().st_mtime_ns)
        if vocabulary is not None and tokens > vocabulary:
            raise UsageError(
                f"{file} is not for this model: it has tokens up to {tokens - 1}, and the model's vocabulary ends at "
                f"{vocabulary - 1}. Give a table that was built from text of this model."
            )
        return table


@functools.lru_cache(maxsize=4)
def _read(file: str, changed: int) -> tuple[NgramTable, int]:
    """The table in a file, and the number of tokens that its vocabulary must have at least."""
    import numpy as np  # here, since `drafting.py` works without it

    try:
        with np.load(file, allow_pickle=False) as opened:
            keys, tokens, levels = (opened[name] for name in ("keys", "tokens", "levels"))
            version, order = int(opened["format"]), int(opened["order"])
    except Exception as error:  # of any kind: only the file can be the cause
        reason = str(error).strip() or type(error).__name__
        raise UsageError(
            f"{file} is not a table of n-grams ({reason}): give a file that `hf-jacobi ngrams` wrote, or get it again "
            "if it is damaged."
        ) from error
    if version != FORMAT:
        raise UsageError(f"{file} has format {version}, and this hf_jacobi reads format {FORMAT}: update hf_jacobi.")
    columns = ((keys, "int64", 1 << 63), (tokens, "int32", 1 << 31), (levels, "uint8", LEVELS))
    valid = all(
        column.ndim == 1 and len(column) and column.dtype == kind and column.min() >= 0 and column.max() < end
        for column, kind, end in columns
    )
    if not (valid and len(keys) == len(tokens) == len(levels) and 1 <= order <= LONGEST):
        raise UsageError(f"{file} is damaged: build it again with `hf-jacobi ngrams`.")
    return NgramTable(memoryview(keys), memoryview(tokens), memoryview(levels), order), int(tokens.max()) + 1


def table_for(model, name: str | None) -> NgramTable | None:
    """The table that `JacobiConfig.ngram_table` names for a model; arguments and errors are those of `load_table`."""
    vocabulary = getattr(model.config.get_text_config(decoder=True), "vocab_size", None)
    return load_table(name, checkpoint_of(model), vocabulary)


def load_table(name: str | None, checkpoint: str, vocabulary: int | None = None) -> NgramTable | None:
    """
    Loads a table.

    Args:
        name: a file, or a folder or a repository on the Hub that holds `TABLE`; `TABLE` itself means the checkpoint,
            which may lack it. `None` for no table.
        checkpoint: the folder or the repository that the model was loaded from.
        vocabulary: the number of tokens of the model, if known.

    Raises:
        `UsageError`: there is no such table, or it cannot be used.
    """
    if name is None:
        return None
    file = find_table(name, checkpoint)
    return None if file is None else NgramTable.read(file, vocabulary)


def checkpoint_of(model) -> str:
    """The folder or the repository of a model, or of the adapter that it was loaded with by this package."""
    return getattr(model, PLACE, None) or model.name_or_path


def loaded_from(model, place: str | Path) -> None:
    """Remembers the folder or the repository of the adapter that a model was loaded with."""
    folder = Path(place)
    setattr(model, PLACE, str(folder.resolve() if folder.is_dir() else place))


def find_table(name: str, checkpoint: str) -> Path | None:
    """
    The file of a table.

    Args:
        name, checkpoint: as in `load_table`.

    Returns:
        The file; `None`, after a warning, if the checkpoint or a repository has none. The text does not depend on it.

    Raises:
        `UsageError`: another place has none.
    """
    own = name == TABLE
    place = checkpoint if own else name
    try:
        here = Path(place).expanduser()
        is_file, is_folder = here.is_file(), bool(place) and here.is_dir()
    except (OSError, RuntimeError) as error:  # no name of a file, no such user
        raise UsageError(f"`ngram_table` names {name!r:.80}, which is no path: {error}.") from error
    if is_file and not own:
        return here
    if is_folder and (here / TABLE).is_file():
        return here / TABLE
    if own and (is_folder or not place):
        _warn(f"drafts do without {TABLE}, which the settings name: {place or 'the checkpoint'} does not hold it")
        return None
    if own or (not is_folder and is_repository(place)):
        return _on_hub(place)
    raise MissingFile(
        f"`ngram_table` names {name}, where there is no table: build one with `hf-jacobi ngrams`, or set "
        "ngram_table=None."
    )


def is_repository(name: str) -> bool:
    """Whether a name can be that of a repository on the Hub."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith(".")


_ASKED: dict[str, tuple[Path | None, float]] = {}  # what the Hub has of each repository, and when it was asked


def _on_hub(repository: str) -> Path | None:
    """
    The file of a table in a repository on the Hub, or in its cache here; warns if there is none.

    What is not found is not asked for again for `PATIENCE` seconds: without a network, an answer takes half a minute.
    """
    from transformers.utils import cached_file

    found, asked = _ASKED.get(repository, (None, -PATIENCE))
    if found is None and time.monotonic() - asked >= PATIENCE:
        try:
            found = Path(cached_file(repository, TABLE) or "")
        except (OSError, ValueError) as error:
            _warn(f"drafts do without {TABLE} of {repository}: {' '.join(str(error).split())}")
        _ASKED[repository] = found, time.monotonic()
    return found


def _warn(message: str) -> None:
    from transformers.utils import logging

    logging.get_logger(__name__).warning_once(message)
