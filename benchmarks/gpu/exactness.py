"""The environment, and whether decoding on this device writes the correct text."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections import Counter
from functools import partial
from pathlib import Path

import models
import torch
import transformers

import hf_jacobi
from benchmarks.miniature.tasks import held_out_problems
from hf_jacobi.cli.models import MINIATURE

from .chain import forced_drafts
from .stage import Stage


# One architecture for each way of making masks or positions.
MASKS = {
    "llama": "causal",
    "mistral-window": "a window in all layers",
    "qwen2-mixed-window": "a window in some layers",
    "gemma3": "two rotary embeddings, a window in some layers",
    "llama4": "chunks",
    "gpt_oss": "sinks and a window, eager attention",
    "gpt2": "positions from a table",
    "deepseek_v3": "latent attention",
}
SETTINGS = (
    {},
    {"block_size": 4, "pool_size": 0},
    {"block_size": 8, "window": "block", "draft_init": "prompt"},
    {"block_size": 16, "max_blocks": 2, "spawn_ratio": 0.5, "pool_size": 4},
)
NEW_TOKENS = 32


def run(stage: Stage) -> None:
    """All figures."""
    stage.measure("environment", environment)
    torch.backends.cuda.matmul.allow_tf32 = False
    for name in list(MASKS)[:3] if stage.dry else MASKS:
        stage.measure(f"float32/{name}", float32, name, stage.device, needs=5)
    stage.measure("bfloat16", bfloat16, stage.device, 8 if stage.dry else 200, 16 if stage.dry else 96, needs=15)


def environment() -> dict:
    """The machine, and the versions of installed packages."""
    facts = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_jacobi": hf_jacobi.__version__,
        "cpus": os.cpu_count(),
        "compiler": shutil.which("gcc") or shutil.which("cc"),
        "commit": _commit(),
    }
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        facts |= {"card": card.name, "memory_gib": card.total_memory / 2**30, "cuda": torch.version.cuda}
    return facts


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:  # git is not installed
        return None


def float32(name: str, device) -> dict:
    """
    A tiny model of an architecture, batch 1 and 3, with drafts that are correct three times in four.

    Returns:
        `greedy`: how many settings, out of all, give AR's text; `sampled`: how many, out of all, give the text of
        blocks of one token with the same seed; `tokens_per_forward` of a row, over all of them.
    """
    model = hf_jacobi.enable(models.tiny_model(name).to(device))
    counts = Counter()
    for rows in (1, 3):
        inputs = {key: tensor.to(device) for key, tensor in models.padded_prompts(rows).items()}
        text = partial(model.generate, **inputs, max_new_tokens=NEW_TOKENS, eos_token_id=None)
        one_by_one = {"decoding": "jacobi", "jacobi_config": {"block_size": 1, "pool_size": 0, "seed": 7}}
        for kind, how, plain in (
            ("greedy", {"do_sample": False}, {"decoding": "ar"}),
            ("sampled", {"do_sample": True, "temperature": 0.8, "top_k": 0}, one_by_one),
        ):
            expected = text(**how, **plain)
            padding = (inputs["attention_mask"] == 0).sum(1).tolist()
            known = [row[amount:] for row, amount in zip(expected.tolist(), padding)]
            prompts = [inputs["input_ids"].shape[1] - amount for amount in padding]

            def follows(so_far: list[int], count: int, known=known, prompts=prompts) -> list[int]:
                own = next(text for text, length in zip(known, prompts) if text[:length] == so_far[:length])
                return own[len(so_far) :][:count]

            for settings in SETTINGS:
                with forced_drafts(0.75, follows, models.VOCABULARY):
                    out = text(
                        **how, decoding="jacobi", jacobi_config=settings | {"seed": 7}, return_dict_in_generate=True
                    )
                counts[kind] += torch.equal(out.sequences, expected)
                counts["tokens"] += sum(row.new_tokens for row in out.jacobi_stats.per_sequence)
                counts["forwards"] += sum(row.forwards for row in out.jacobi_stats.per_sequence)
    total = 2 * len(SETTINGS)
    return {
        "mask": MASKS[name],
        "greedy": f"{counts['greedy']} of {total}",
        "sampled": f"{counts['sampled']} of {total}",
        "tokens_per_forward": counts["tokens"] / counts["forwards"],
    }


def bfloat16(device, count: int, new_tokens: int) -> dict:
    """
    How often half precision writes the same text: by Jacobi decoding, and by AR in batches of another size.

    The model is the miniature, whose drafts are accepted; the prompts are held-out problems.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(MINIATURE, dtype=torch.bfloat16).eval().to(device)
    hf_jacobi.enable(model)
    tokenizer = AutoTokenizer.from_pretrained(MINIATURE, padding_side="left")
    prompts = sorted((problem.prompt for problem in held_out_problems((count + 1) // 2)), key=len)[:count]
    forwards = tokens = 0

    def texts(batch: int, decoding: str) -> list[list[int]]:
        nonlocal forwards, tokens
        found = []
        for start in range(0, count, batch):
            inputs = tokenizer(prompts[start : start + batch], padding=True, return_tensors="pt").to(device)
            inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            length = inputs["input_ids"].shape[1]
            out = model.generate(
                **inputs,
                decoding=decoding,
                max_new_tokens=new_tokens,
                do_sample=False,
                return_dict_in_generate=True,
            )
            rows = out.sequences[:, length:].tolist()
            ends = model.generation_config.eos_token_id
            found += [row[: row.index(ends)] if ends in row else row for row in rows]
            if decoding == "jacobi":
                forwards += sum(row.forwards for row in out.jacobi_stats.per_sequence)
                tokens += sum(row.new_tokens for row in out.jacobi_stats.per_sequence)
        return found

    whole, half = max(1, count // 5), max(1, count // 10)
    ar = texts(whole, "ar")
    share = lambda other: sum(one == two for one, two in zip(ar, other)) / count  # noqa: E731
    return {
        "prompts": count,
        "ar_again": share(texts(whole, "ar")),
        "ar_in_half_the_batch": share(texts(half, "ar")),
        "jacobi": share(texts(whole, "jacobi")),
        "tokens_per_forward": tokens / forwards,
    }
