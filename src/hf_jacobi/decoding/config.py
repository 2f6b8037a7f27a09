"""`JacobiConfig`: the settings of Jacobi decoding, validated at construction and kept in `generation_config`."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .costs import check_cost
from .errors import UsageError, check_range
from .files import read_json, write_whole


WINDOWS = ("block", "sliding")
DRAFT_INITS = ("prompt", "ngram", "repeat", "vocabulary")
DEFAULT_BLOCK_SIZE = 16
LEAST = {"block_size": 1, "max_blocks": 1, "pool_size": 0, "ngram_size": 1}


@dataclass
class JacobiConfig:
    """
    Settings of Jacobi decoding. They change the number and the size of the forwards, never the text. (In half
    precision two tokens can tie, and the size of a forward then decides which one wins.)

    > Parameters that control the draft

    Args:
        block_size (`int`, *optional*):
            n, the number of consecutive positions refined together: one forward scores the newest committed token and
            the n - 1 draft tokens after it. With 1, only recycled n-grams are tried. If omitted, the window adapts
            itself (`adaptive`) between 1 and 16.
        window (`"sliding"` or `"block"`, defaults to `"sliding"`):
            `"block"` refines a block until all of it has converged, then starts the next one, as the paper does;
            `"sliding"` refills the draft to n positions after every forward.
        max_blocks (`int`, defaults to 1):
            K, the largest number of blocks in flight: one real-active and K - 1 pseudo-active ones (paper, section
            3.3).
        spawn_ratio (`float`, defaults to 0.85):
            r in (0, 1]: the next block is spawned once this share of the newest one has converged.
        draft_init (`"prompt"`, `"ngram"`, `"repeat"` or `"vocabulary"`, defaults to `"ngram"`):
            First guess for new positions. `"prompt"` draws tokens from the prompt, as the paper does; `"ngram"` takes
            the continuation of the draft's last tokens in the n-gram pool, and tokens of the prompt if the pool has
            none; `"repeat"` repeats the last token; `"vocabulary"` draws from the whole vocabulary, for adapters that
            were trained on such noise. With `"ngram"`, the pool's continuation also replaces the model's own rejected
            predictions as the next draft for as long as it is correct further than they are.
        adaptive (`bool`, *optional*):
            Whether the draft adapts: each forward tries the number of tokens, of its own predictions and of n-grams,
            that yields the most tokens per cost, judged by the guesses accepted so far and by `position_cost`. It
            tries up to `block_size` of each, and none where nothing pays, so that text that the model cannot predict
            in parallel costs what it costs without drafts. Needs `window="sliding"`. Defaults to `True` if
            `block_size` is omitted and the window slides, else to `False`.
        position_cost (`float`, `list` or `dict`, *optional*):
            What the positions of a forward cost, for a draft that adapts: the cost of one more position in forwards
            over one token (`0.05`); the cost by number of positions, in any unit (`[[1, 77], [2, 130], [16, 216]]`);
            or such lists by batch size (`{1: [...], 8: [...]}`). If omitted, it is measured in the first call of at
            least 32 new tokens, which takes about the time of ten tokens, and is kept as long as the model. The drafts
            that are tried, and in half precision the way ties fall, then depend on the clock; the text does not.
            `hf-jacobi tune` writes the measured cost into a checkpoint.

    > Parameters that control rejection recycling

    Args:
        pool_size (`int`, defaults to 4):
            The largest number of n-grams of the pool that one forward verifies beside the draft; 0 switches recycling
            off.
        ngram_size (`int`, defaults to 6):
            The number of tokens of an n-gram that are tried after the token it continues.
        pool_prompt (`bool`, defaults to `True`):
            Whether the pool also holds the n-grams of the prompt.

    > Parameters that control n-grams of other text

        ngram_table (`str`, *optional*):
            A table of n-grams from text that this model wrote before (`build_ngram_table`): a file, or a folder or a
            repository on the Hub that holds `ngrams.npz`. The name `"ngrams.npz"` itself means the checkpoint that the
            model was loaded from. The table's guesses are drafted beside the others and cost no forward.

    > Parameters that control randomness

    Args:
        seed (`int`, *optional*):
            Seed of the noise of sampled text and of the first guesses. With `do_sample=True` the text depends on the
            seed alone, not on the settings above. `None` draws the seed from torch's default generator.

    Raises:
        `ValueError`: a value is out of range; the message gives the value and what would be correct.

    Example:

    ```python
    >>> JacobiConfig()  # adapts itself: start with this one
    >>> JacobiConfig(block_size=64, max_blocks=2, spawn_ratio=0.85, pool_size=4)  # the paper's, for trained models
    ```

    Source: Hu et al., "Fast and Accurate Causal Parallel Decoding using Jacobi Forcing", arXiv 2512.14681, section 3.
    """

    block_size: int | None = None
    window: Literal["sliding", "block"] = "sliding"
    max_blocks: int = 1
    spawn_ratio: float = 0.85
    draft_init: Literal["prompt", "ngram", "repeat", "vocabulary"] = "ngram"
    adaptive: bool | None = None
    position_cost: float | list | dict | None = None
    pool_size: int = 4
    ngram_size: int = 6
    pool_prompt: bool = True
    ngram_table: str | None = None
    seed: int | None = None

    def __post_init__(self):
        if isinstance(self.ngram_table, Path):  # not JSON
            self.ngram_table = str(self.ngram_table)
        self.validate()
        for name in (*LEAST, "spawn_ratio", "seed"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, (int, float)):  # NumPy's numbers are not JSON
                setattr(self, name, float(value) if name == "spawn_ratio" else int(value))

    @property
    def size(self) -> int:
        """n: `block_size`, or its default."""
        return DEFAULT_BLOCK_SIZE if self.block_size is None else self.block_size

    @property
    def adapts(self) -> bool:
        """Whether the window adapts itself: `adaptive`, or its default."""
        if self.adaptive is None:
            return self.block_size is None and self.window == "sliding"
        return self.adaptive

    def validate(self) -> None:
        """Raises `ValueError` for the first value that is out of range."""
        for name, least in LEAST.items():
            optional = name == "block_size"
            check_range(f"JacobiConfig: `{name}`", getattr(self, name), least, whole=True, optional=optional)
        if self.window not in WINDOWS:
            raise UsageError(f"JacobiConfig: `window` must be one of {WINDOWS}, got {self.window!r}.")
        if self.draft_init not in DRAFT_INITS:
            raise UsageError(f"JacobiConfig: `draft_init` must be one of {DRAFT_INITS}, got {self.draft_init!r}.")
        check_range("JacobiConfig: `spawn_ratio`", self.spawn_ratio, above=0, most=1)
        check_cost(self.position_cost)
        check_range("JacobiConfig: `seed`", self.seed, whole=True, optional=True)
        if not isinstance(self.pool_prompt, bool):
            raise UsageError(f"JacobiConfig: `pool_prompt` must be True or False, got {self.pool_prompt!r}.")
        if self.ngram_table is not None and (not isinstance(self.ngram_table, str) or not self.ngram_table.strip()):
            raise UsageError(
                "JacobiConfig: `ngram_table` must be the name of a file, a folder or a repository, or None, got "
                f"{self.ngram_table!r}."
            )
        if self.adaptive is not None and not isinstance(self.adaptive, bool):
            raise UsageError(f"JacobiConfig: `adaptive` must be True, False or None, got {self.adaptive!r}.")
        if self.adaptive and self.window != "sliding":
            raise UsageError("JacobiConfig: `adaptive=True` needs a sliding window: set window='sliding' with it.")

    def to_dict(self) -> dict[str, Any]:
        """The settings as a JSON-serializable dict, which `JacobiConfig.from_dict` reads."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> JacobiConfig:
        """
        Reads the settings that `to_dict` wrote, for instance `generation_config.jacobi` of a loaded checkpoint.

        Raises:
            `ValueError`: a key is not a setting, or a value is out of range.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise UsageError(f"JacobiConfig: unknown settings {unknown}; the settings are {known}.")
        return cls(**settings)

    @classmethod
    def coerce(cls, value: JacobiConfig | dict[str, Any] | None) -> JacobiConfig:
        """A `JacobiConfig` from one, from a dict of settings, or from `None` (the defaults)."""
        if value is None:
            return cls()
        if isinstance(value, cls):
            value.validate()
            return value
        if isinstance(value, dict):
            return cls.from_dict(value)
        if type(value).__name__ == cls.__name__:  # from, or for, a published checkpoint's own copy of this module
            return cls.from_dict(value.to_dict())
        raise UsageError(f"`jacobi_config` must be a JacobiConfig or a dict of its settings, got {type(value)}.")


def write_settings(folder: Path, decoding: str | None = None, jacobi: dict[str, Any] | None = None) -> dict[str, Any]:
    """
    Writes how a checkpoint decodes into its `generation_config.json`, and leaves the rest of the file unchanged. If
    that is a link, a file in the folder replaces it.

    Args:
        folder: the folder of the checkpoint.
        decoding, jacobi: `"ar"` or `"jacobi"`, and settings of `JacobiConfig`. If omitted, those in the file, else
            Jacobi decoding with its default settings.

    Returns:
        `decoding` and `jacobi` as the file now holds them.
    """
    from .compat import DERIVED  # not at module level, since compat imports transformers

    file = folder / "generation_config.json"
    content = read_json(file) if file.exists() else {}
    content.pop(DERIVED, None)
    settings = {
        "decoding": decoding or content.get("decoding") or "jacobi",
        "jacobi": JacobiConfig.coerce(jacobi if jacobi is not None else content.get("jacobi")).to_dict(),
    }
    write_whole(file, json.dumps(content | settings, indent=2) + "\n")
    return settings
