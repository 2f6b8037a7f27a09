"""The trainings and the ways of decoding of the miniature: the rows of its tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_jacobi.evaluation.measuring import Method


BASE_PROBLEMS = 120_000
MAIN, SHORT = 12_000, 3_000  # prompts of the main table, and of the ablations


@dataclass(frozen=True)
class Recipe:
    """
    One Jacobi Forcing of the base model.

    Args:
        name: of the folder and of the rows.
        block_size, window_size, noise_schedule: of the data. A window of 1 is CLLM.
        clean_share: the share of steps, at the beginning, with clean context (a window of 1, random noise) whatever
            the window is: drafting is learned sooner that way.
        mixed: spread these rows over the whole training instead.
        adapter: `None` for the whole model, `"lora"` for an adapter, `"draft"` for one that only drafts.
        prompts: how many completions it is trained on.
        steps: how many steps of four rows it takes.
        learning_rate, ar_loss_weight, ar_loss_weight_start: of these steps. Drafts are learned first, with a small
            weight of the AR loss; the text recovers as that weight grows.
        mending_steps: how many more steps repair the text: with sixteen rows, at a low rate and the last weight of
            the AR loss, on completions that solve their problem. Whole models only.
        checkpoints: how many checkpoints before mending are tried on validation problems, including the last.
    """

    name: str
    block_size: int = 16
    window_size: int = 4
    noise_schedule: str = "linear"
    clean_share: float = 0.0
    mixed: bool = False
    adapter: str | None = None
    prompts: int = SHORT
    steps: int = 1_500
    learning_rate: float = 1e-3
    ar_loss_weight: float = 30.0
    ar_loss_weight_start: float = 1.0
    mending_steps: int = 0
    checkpoints: int = 1

    @property
    def training(self) -> dict[str, Any]:
        """The arguments of `JacobiForcingConfig` for the steps before mending."""
        scope = "draft" if self.adapter == "draft" else "all"
        return {
            "learning_rate": self.learning_rate,
            "ar_loss_weight": self.ar_loss_weight,
            "ar_loss_weight_start": self.ar_loss_weight_start,
            "adapter_scope": scope,
        }

    @property
    def mending(self) -> dict[str, Any]:
        """Its arguments for mending. Steps of few rows would undo it, because most rows contain no mistake."""
        return {
            "learning_rate": 2e-4,
            "ar_loss_weight": self.ar_loss_weight,
            "gradient_accumulation_steps": 4,
            "max_grad_norm": 50.0,
        }


def in_blocks(n: int, blocks: int = 1, ratio: float = 0.85, pool: int = 0) -> Method:
    """The paper's block-wise decoding, optionally with multi-block decoding and recycling."""
    name = f"blocks of {n}" + (f", K={blocks}, r={ratio}" if blocks > 1 else "") + (f", pool {pool}" if pool else "")
    settings: dict[str, Any] = {"block_size": n, "window": "block", "pool_size": pool, "draft_init": "prompt"}
    return Method(name, "jacobi", settings | {"max_blocks": blocks, "spawn_ratio": ratio})


def sliding(n: int, pool: int = 0) -> Method:
    """A sliding window, which always holds `n` positions."""
    draft = "ngram" if pool else "prompt"
    settings = {"block_size": n, "window": "sliding", "pool_size": pool, "draft_init": draft}
    return Method(f"sliding {n}" + (f", pool {pool}" if pool else ""), "jacobi", settings)


FULL = {"prompts": MAIN, "steps": 9_000, "ar_loss_weight": 300.0, "mending_steps": 1_000, "checkpoints": 6}
DRAFT = {"adapter": "draft", "window_size": 1, "noise_schedule": "random"}
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("forcing", noise_schedule="random", clean_share=0.3, **FULL),  # type: ignore[arg-type]
        Recipe("forcing-linear", clean_share=0.3, **FULL),  # type: ignore[arg-type]
        Recipe("cllm", window_size=1, noise_schedule="random", **FULL),  # type: ignore[arg-type]
        Recipe("draft", **DRAFT, prompts=MAIN, steps=12_000, checkpoints=4),  # type: ignore[arg-type]
        Recipe("linear-w4"),
        Recipe("random-w4", noise_schedule="random"),
        Recipe("reverse-w4", noise_schedule="reverse"),
        Recipe("linear-w8", window_size=8),
        Recipe("linear-w16", window_size=16),
        Recipe("random-w1", window_size=1, noise_schedule="random"),
        Recipe("mixed-w4", clean_share=0.5, mixed=True),
        Recipe("linear-w4-n32", block_size=32),
        Recipe("random-w1-n32", block_size=32, window_size=1, noise_schedule="random"),
        Recipe("linear-w4-n64", block_size=64),
        Recipe("random-w1-n64", block_size=64, window_size=1, noise_schedule="random"),
        Recipe("lora", adapter="lora"),
        Recipe("draft-short", **DRAFT),  # type: ignore[arg-type]
    )
}
MR = in_blocks(16, blocks=2, pool=4)
METHODS = (in_blocks(16), MR, sliding(16), sliding(32, pool=4))
