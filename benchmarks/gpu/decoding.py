"""Decoding at the shape of a 7B model: AR, AR with a static cache, Jacobi; what a position costs; what a step does."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from contextlib import nullcontext
from functools import partial

import torch
from transformers import CompileConfig

import hf_jacobi
from hf_jacobi.decoding.compat import attending_by, flash_kernel

from .chain import QWEN_7B, TOY, chain_model, chain_prompt, chain_text, forced_chain
from .stage import Stage
from .timing import Clock, ForwardClock, peak_memory


RIGHT = 0.75  # probability that a draft token is correct, so that a forward commits about four tokens
POSITIONS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def run(stage: Stage) -> None:
    """All figures, most important first."""
    shape = TOY if stage.dry else QWEN_7B
    dtype = torch.float32 if stage.dry else torch.bfloat16
    tokens, sizes = (12, (8, 16)) if stage.dry else (128, (16, 32, 64))
    contexts, batches = ((16, 48), (1, 2)) if stage.dry else ((512, 8192), (1, 4, 16))
    short, long = contexts
    start = time.monotonic()
    model = hf_jacobi.enable(chain_model(shape, stage.device, dtype))
    stage.measure("model", lambda: {"seconds": time.monotonic() - start, "gib": model.get_memory_footprint() / 2**30})
    timed = partial(decode, model, tokens=tokens)

    stage.measure("ar/context 512/batch 1", timed, "ar", short, 1)
    for size in sizes:
        stage.measure(f"jacobi {size}/context 512/batch 1", timed, size, short, 1)
    stage.measure("positions/context 512", positions, model, short, POSITIONS[:4] if stage.dry else POSITIONS, needs=8)
    stage.measure("step/context 512", profile, model, short, sizes[1], tokens, needs=10)
    stage.measure("ar static/context 512/batch 1", timed, "static", short, 1, needs=40)
    for size in sizes[1::-1]:
        stage.measure(f"jacobi {size} static/context 512/batch 1", timed, size, short, 1, kind="static", needs=60)
    kinds = {"static": 60} | ({} if flash_kernel() is None else {"flash": 8})  # with the seconds that they need
    if "flash" in kinds:
        stage.measure(f"jacobi {sizes[1]} flash/context 512/batch 1", timed, sizes[1], short, 1, kind="flash", needs=8)
    for batch in batches[1:]:
        for way in ("ar", *sizes):
            stage.measure(f"{_name(way)}/context 512/batch {batch}", timed, way, short, batch, needs=8)
    for batch in batches:
        for way in ("ar", *sizes):
            stage.measure(f"{_name(way)}/context 8k/batch {batch}", timed, way, long, batch, needs=10)
    stage.measure("positions/context 8k", positions, model, long, POSITIONS[:4] if stage.dry else POSITIONS, needs=12)
    for context, batch in ((long, 1), (short, batches[-1])):
        name, size = "512" if context == short else "8k", sizes[1]
        stage.measure(f"ar static/context {name}/batch {batch}", timed, "static", context, batch, needs=40)
        for kind, needs in kinds.items():
            figure = f"jacobi {size} {kind}/context {name}/batch {batch}"
            stage.measure(figure, timed, size, context, batch, kind=kind, needs=needs)


def _name(way: str | int) -> str:
    return way if isinstance(way, str) else f"jacobi {way}"


def decode(model, way: str | int, context: int, batch: int, tokens: int, kind: str = "") -> dict:
    """
    Decodes twice and times the second run.

    Args:
        model: a chain model.
        way: `"ar"`, `"static"` (AR on transformers' static cache, which compiles it on a GPU), or the block size of
            Jacobi decoding with forced drafts.
        context, batch, tokens: prompt length, rows, new tokens of each row.
        kind: of Jacobi decoding: `"static"` (fixed shapes, compiled, and captured on a GPU), or `"flash"` (attention
            of the flash-attn package).

    Returns:
        `tokens_per_second` of all rows, `ms_per_token` of one and `ms_per_forward`, all after the first token;
        `tokens_per_forward` of a row; `first_token_seconds` (the prefill); `warm_up_seconds` (the first call, with all
        compiling); `exact`: the share of rows whose text is the known one; `peak_gib`.
    """
    vocabulary = model.config.vocab_size
    prompt = chain_prompt(batch, context, vocabulary, model.device)
    arguments = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": tokens, "do_sample": False}
    if isinstance(way, int):
        arguments |= {"decoding": "jacobi", "jacobi_config": {"block_size": way, "pool_size": 0}}
    if "static" in (way, kind):
        arguments |= {"cache_implementation": "static"}
    if kind == "static" and not torch.cuda.is_available():  # compiling for a CPU is not measured here
        arguments |= {"compile_config": CompileConfig(backend="eager")}
    figure: dict = {}
    for name in ("warm_up_seconds", "seconds"):
        clock = Clock()
        start = time.perf_counter()
        attention = attending_by(model, "flash_attention_2") if kind == "flash" else nullcontext()
        with attention, forced_chain(RIGHT, vocabulary), peak_memory(figure):
            out = model.generate(prompt, **arguments, return_dict_in_generate=True, streamer=clock)
        figure[name] = time.perf_counter() - start
    new = out.sequences[:, context:]
    exact = (new == chain_text(prompt, tokens, vocabulary)).all(1).float().mean().item()
    rows = out.jacobi_stats.per_sequence if isinstance(way, int) else []
    forwards = out.jacobi_stats.forwards if rows else tokens
    return figure | {
        "tokens_per_second": batch / clock.seconds_per_token,
        "ms_per_token": 1000 * clock.seconds_per_token,
        "ms_per_forward": 1000 * clock.seconds_per_token * (tokens - 1) / (forwards - 1),
        "tokens_per_forward": batch * tokens / sum(row.forwards for row in rows) if rows else 1.0,
        "first_token_seconds": clock.times[0] - start,
        "exact": exact,
    }


def positions(model, context: int, sizes: tuple[int, ...]) -> dict:
    """
    Milliseconds that a forward over n positions takes at batch 1, and those of the rest of its step, with drafts of n
    positions that are all wrong.
    """
    vocabulary = model.config.vocab_size
    prompt = chain_prompt(1, context, vocabulary, model.device)
    rows = {}
    for size in sizes:
        for tokens in (4, 24):  # warm up, measure
            clock, forwards = Clock(), ForwardClock(model)
            with forced_chain(0.0, vocabulary), forwards:
                model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    decoding="jacobi",
                    max_new_tokens=tokens + size,  # room for whole drafts up to the end
                    eos_token_id=int(chain_text(prompt, tokens, vocabulary)[0, -1]),
                    pad_token_id=0,
                    jacobi_config={"block_size": size, "pool_size": 0},
                    do_sample=False,
                    streamer=clock,
                )
        step, forward = 1000 * clock.seconds_per_token, forwards.milliseconds()
        rows[str(size)] = {"forward_ms": forward, "step_ms": step, "outside_ms": step - forward}
    one = rows[str(sizes[0])]
    for row in rows.values():
        row["forward_over_one"] = row["forward_ms"] / one["forward_ms"]
    return rows


def profile(model, context: int, size: int, tokens: int) -> dict:
    """
    Kernels, copies and waits of one step at batch 1: means over a text, without its prefill.

    Returns:
        counts per step: `kernels`, `to_device`, `to_host`, `on_device` (copies), `waits` (of the host for the device),
        `operations` (of torch); `device_busy_ms` of `step_ms`; `longest`: the slowest kernels, in ms per step.
    """
    vocabulary = model.config.vocab_size
    prompt = chain_prompt(1, context, vocabulary, model.device)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities)
    clock, forwards = Clock(at_first_token=profiler.start), ForwardClock(model)
    with forced_chain(RIGHT, vocabulary), forwards, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            do_sample=False,
            decoding="jacobi",
            jacobi_config={"block_size": size, "pool_size": 0},
            streamer=clock,
        )
    profiler.stop()
    steps = forwards.count
    counts, kernel_ms = Counter(), Counter()
    for event in profiler.events():
        name = event.name
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kind = "kernels"
            if name.startswith("Memcpy"):
                kind = {"HtoD": "to_device", "DtoH": "to_host"}.get(name.split()[1], "on_device")
            counts[kind] += 1
            kernel_ms[name[:80]] += event.device_time_total / 1000
        elif name in ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"):
            counts["waits"] += 1
        elif name.startswith("aten::"):
            counts["operations"] += 1
    return {
        "steps": steps,
        **{name: value / steps for name, value in sorted(counts.items())},
        "device_busy_ms": sum(kernel_ms.values()) / steps,
        "step_ms": 1000 * (clock.times[-1] - clock.times[0]) / steps,
        "longest": {name: value / steps for name, value in kernel_ms.most_common(15)},
    }
