"""`bench` compares AR, prompt lookup and Jacobi decoding on one machine in one run."""

from __future__ import annotations

import platform
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import transformers

from ..decoding.compat import attention_of, compiles_assisted_decoding
from ..decoding.errors import UsageError
from ..decoding.mixin import setting_of, unwrap
from .measuring import AR, COMPILED_LOOKUP, PROMPT_LOOKUP, Method, compare, race
from .pairs import fastest_pair


WIDTH = 80  # columns of a table
WORTHWHILE = 1.02  # speed-up over AR; less is noise
LEGEND = """\
speed-up: over the first line, above 1 is faster; range: the lowest and the
highest speed-up of a batch; first: the time to the first token; same: the share
of texts that equal those of the first line"""
DEFAULT = Method("Jacobi, default", "jacobi", {})
OWN = "Jacobi, the checkpoint's"
DEFAULT_METHODS = (
    AR,
    PROMPT_LOOKUP,
    DEFAULT,
    Method("Jacobi, n=16, K=2, r=0.85, pool 4", "jacobi", {"block_size": 16, "max_blocks": 2}),
    Method("Jacobi, n=32, sliding, pool 4", "jacobi", {"block_size": 32}),
    Method("Jacobi, n=16, blocks, no pool", "jacobi", {"block_size": 16, "window": "block", "pool_size": 0}),
)


def methods_of(model) -> tuple[Method, ...]:
    """
    The methods that are compared by default: `DEFAULT_METHODS`; compiled prompt lookup, if transformers compiles it by
    default; and Jacobi decoding with the settings in the model's generation config, if any.
    """
    compiled = [COMPILED_LOOKUP] if compiles_assisted_decoding(unwrap(model)) else []
    settings = setting_of("jacobi", None, unwrap(model))
    own = [] if settings is None else [Method(OWN, "jacobi", settings)]
    return (*DEFAULT_METHODS[:2], *compiled, *own, *DEFAULT_METHODS[2:])


def bench(
    model,
    tokenizer,
    prompts: Sequence[Sequence[int]],
    methods: Sequence[Method] | None = None,
    *,
    batch_sizes: Sequence[int] = (1,),
    max_new_tokens: int = 128,
    repeats: int = 1,
    base=None,
    progress: Callable[[Iterator, int], Iterator] = lambda runs, total: runs,
) -> dict[str, Any]:
    """
    Decodes the same prompts with several methods, each batch with all methods in turn.

    Args:
        model: an enabled model. A model with an adapter takes part in its fastest form (`fastest_pair`).
        tokenizer: its tokenizer, for the padding.
        prompts: token ids of each prompt.
        methods: the decoding methods, `methods_of(model)` by default. The others are compared with the first. Prompt
            lookup takes part only in batches of one.
        batch_sizes: the numbers of rows decoded together; prompts that do not fill a batch are left out.
        max_new_tokens: the maximum number of new tokens per prompt.
        repeats: how many times each batch is decoded.
        base: the model that decodes by AR and by prompt lookup, by default the second of `fastest_pair(model)`.
        progress: wraps the iterator over batches, given their number.

    Returns:
        `setup`, the hardware, software and lengths; and `results`, for each batch size and method the figures of
        `compare` with `batch_size`, `decoding` (the method's name), and `runs`, the tokens per second of each batch.

    Raises:
        `ValueError`: there are fewer prompts than rows in a batch, or the model has no fast form for AR
            (`fastest_pair`).
    """
    methods = methods_of(model) if methods is None else methods
    check_prompts(prompts, batch_sizes)
    if len({method.name for method in methods}) < len(methods):
        raise UsageError("two decoding methods have the same name: give each its own.")
    model, base = fastest_pair(model, base)
    results = []
    for size in batch_sizes:
        batches = [
            pad(prompts[start : start + size], tokenizer, unwrap(model).device)
            for start in range(0, len(prompts) - size + 1, size)
        ]
        contestants = {
            method.name: (base if method.decoding != "jacobi" else model, method)
            for method in methods
            if size == 1 or method.decoding != "prompt_lookup"
        }
        raced = race(contestants, batches * repeats, max_new_tokens)
        runs = list(progress(raced, len(batches) * repeats))
        for name, figures in compare(runs).items():
            pace = [run[name].count / run[name].seconds for run in runs]
            results.append({"batch_size": size, "decoding": name, **figures, "runs": pace})
    return {"setup": setup_of(model) | {"max_new_tokens": max_new_tokens, "prompts": len(prompts)}, "results": results}


def check_prompts(prompts: Sequence[Sequence[int]], batch_sizes: Sequence[int] = (1,)) -> None:
    """Raises `UsageError` if a prompt is empty, or if there are too few prompts for a batch."""
    if not prompts:
        raise UsageError("there are no prompts: give at least one.")
    if not all(prompts):
        raise UsageError("a prompt is empty: leave it out.")
    if max(batch_sizes) > len(prompts):
        raise UsageError(f"there are {len(prompts)} prompts, too few for batches of {max(batch_sizes)}: give more.")


def evaluation_of(
    report: Mapping[str, Any], model: str, dataset: str, settings: Mapping[str, Any], own: str
) -> dict[str, Any]:
    """
    The evaluation for `publish(evaluation=...)`: a checkpoint with its own settings, compared with AR and prompt
    lookup.

    Args:
        report: the report of `bench`.
        model: the checkpoint's name.
        dataset: the name of the prompts.
        settings: the checkpoint's decoding settings, `decoding` and `jacobi` as in its generation config.
        own: the name of the method that uses these settings.
    """
    setup = report["setup"]
    length = f"{setup['prompts']} prompts, at most {setup['max_new_tokens']} new tokens"
    kept = {
        AR.name: "AR",
        PROMPT_LOOKUP.name: "prompt lookup",
        COMPILED_LOOKUP.name: COMPILED_LOOKUP.name,
        own: "Jacobi",
    }
    results = [
        {
            "dataset": dataset if row["batch_size"] == 1 else f"{dataset}, batches of {row['batch_size']}",
            "decoding": kept[row["decoding"]],
            "metrics": {
                "tokens_per_forward": row["tokens_per_forward"],
                "tokens_per_second": row["tokens_per_second"],
                "speedup": row["speedup"],
                "identical_texts": row["identical"],
            },
        }
        for row in report["results"]
        if row["decoding"] in kept
    ]
    return {
        "measured_on": f"{described(setup)}; {length}",
        "model": model,
        "settings": dict(settings),
        "results": results,
    }


def described(setup: Mapping[str, Any]) -> str:
    """The result of `setup_of` in one phrase."""
    threads = f"{setup['threads']} thread{'s' if setup['threads'] > 1 else ''}"
    parts = (threads, setup["dtype"], f"{setup['attention']} attention")
    versions = (f"{package} {setup[package]}" for package in ("torch", "transformers"))
    return ", ".join((setup["device"], *parts, *versions))


def pad(prompts: Sequence[Sequence[int]], tokenizer, device: torch.device) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, `[batch, length]`, padded on the left."""
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    length = max(map(len, prompts))
    ids = [[filler] * (length - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


def setup_of(model) -> dict[str, Any]:
    """The hardware and software that a model runs on."""
    inner = unwrap(model)
    on_gpu = inner.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(inner.device) if on_gpu else processor(),
        "threads": torch.get_num_threads(),
        "dtype": str(inner.dtype).removeprefix("torch."),
        "attention": attention_of(inner.config.get_text_config(decoder=True)),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def processor() -> str:
    """The name of the CPU and the number of its cores."""
    file = Path("/proc/cpuinfo")  # psutil does not report the name
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor() or platform.machine()


def table(report: Mapping[str, Any]) -> str:
    """
    The report as a table, `WIDTH` columns wide, with a section for each batch size. A star marks a speed-up for text
    that differs from the first method's.
    """
    figures = ("TPF", "tokens/s", "speed-up", "range", "first", "memory", "same")
    widths = (6, 9, 9, 13, 8, 8, 5)
    room = WIDTH - sum(widths)
    lines, differs = [], False
    for size, rows in groupby(report["results"], key=lambda row: row["batch_size"]):
        title = f"batches of {size}" if size > 1 else "one at a time"
        lines += ["", f"{title:{room}}" + "".join(f"{name:>{width}}" for name, width in zip(figures, widths))]
        for row in rows:
            differs = differs or row["identical"] < 1
            cells = (
                f"{row['tokens_per_forward']:.2f}",
                f"{row['tokens_per_second']:.1f}",
                f"{row['speedup']:.2f}x{' ' if row['identical'] == 1 else '*'}",
                f"{row['slowest']:.2f}-{row['fastest']:.2f}x",
                f"{1000 * row['first_token_seconds']:.0f} ms",
                _memory(row["peak_bytes"]),
                f"{100 * row['identical']:.0f}%",
            )
            first, *others = textwrap.wrap(row["decoding"], room, subsequent_indent="  ") or [""]
            lines.append(f"{first:{room}}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths)))
            lines += others
    lines += [*_where_it_pays(report), "", LEGEND]
    if differs:
        lines += ["* Some of the text differs from that of the first line."]
    return "\n".join(lines[1:])


def _where_it_pays(report: Mapping[str, Any]) -> list[str]:
    """For several batch sizes: the fastest Jacobi decoding of each, and the size from which on none pays."""
    jacobi = [row for row in report["results"] if row["decoding"].startswith("Jacobi")]
    best: dict[int, dict[str, Any]] = {}
    for row in jacobi:
        best[row["batch_size"]] = max(best.get(row["batch_size"], row), row, key=lambda one: one["speedup"])
    if len(best) < 2:
        return []
    lines = ["", f"{'rows':>4}  {'speed-up':>8}  fastest Jacobi decoding"]
    for size, row in best.items():
        lines.append(f"{size:>4}  {row['speedup']:>7.2f}x  {row['decoding']}"[:WIDTH])
    loses = min((size for size, row in best.items() if row["speedup"] < WORTHWHILE), default=None)
    return lines + ["It pays at every batch size." if loses is None else f"It stops paying at batches of {loses}."]


def _memory(peak: int | None) -> str:
    if peak is None:
        return ""
    return f"{peak / 1e6:.0f} MB" if peak < 1e10 else f"{peak / 1e9:.1f} GB"
