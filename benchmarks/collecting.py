"""
How fast trajectories are collected: blocks per second, compared with simpler ways to get the same states.

    python -m benchmarks.stdlib_prompts prompts.jsonl
    python -m benchmarks.collecting prompts.jsonl --dtype bfloat16 --output collecting.json

`plain`: one block of one text at a time, one causal forward over prefix and state for each state, no cache.
`cached`: the decode loop with batch 1, `window="block"`, recording every draft.
`batched`: the same decode loop, with many texts in a batch.
`collect`: `collect_trajectories`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers
from datasets import disable_progress_bars

import hf_jacobi
from hf_jacobi.cli.demo_model import DEMO_MODEL
from hf_jacobi.cli.models import load
from hf_jacobi.trajectories import collect_trajectories
from hf_jacobi.trajectories.collect import read_report
from hf_jacobi.trajectories.prompts import encode_prompt, open_prompts
from hf_jacobi.trajectories.report import CollectReport


def plain(model, prompts, size: int, length: int) -> int:
    """Refines blocks in the slow and obvious way; the model makes the texts token by token."""
    blocks = 0
    for prompt in prompts:
        text = list(prompt)
        inputs = torch.tensor([prompt])
        written = model.generate(
            inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=length, decoding="ar"
        )[0, len(prompt) :].tolist()
        for start in range(0, len(written), size):
            final = written[start : start + size]
            state = (prompt * size)[: len(final)]
            for _ in range(len(final)):
                if state == final:
                    break
                with torch.no_grad():
                    logits = model(torch.tensor([text + state])).logits[0, len(text) - 1 : -1]
                state = logits.argmax(-1).tolist()
            text += final
            blocks += 1
    return blocks


def loop(model, prompts, size: int, length: int, pad: int) -> int:
    """Refines blocks in the decode loop, with all prompts in one batch."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    config = hf_jacobi.JacobiConfig(block_size=size, window="block", draft_init="prompt", pool_size=0)
    output = model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=length,
        decoding="jacobi",
        jacobi_config=config,
        output_trajectory=True,
        return_dict_in_generate=True,
    )
    return sum(len(trajectory.blocks(size)) for trajectory in output.trajectory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", help="a file of prompts")
    parser.add_argument("--model", help=f"a local folder or a Hub id (default: {DEMO_MODEL})")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="how often each way is measured; the ways take turns")
    parser.add_argument("--skip", nargs="*", default=[], choices=("plain", "cached", "batched"))
    parser.add_argument("--output", help="a JSON file for the results")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    model, tokenizer = load(arguments.model, arguments.dtype)
    hf_jacobi.enable(model)
    rows = open_prompts(arguments.prompts)
    encoded = [encode_prompt(i, rows[i], None, tokenizer, False).ids for i in range(arguments.batch_size)]
    length = arguments.max_new_tokens

    def collect(size: int, first: int) -> int:
        some = rows.select(range(first, first + arguments.batch_size))
        with tempfile.TemporaryDirectory() as folder:
            collect_trajectories(
                model, tokenizer, some, size, length, arguments.batch_size, folder, progress=False, repetition="keep"
            )
            report: CollectReport = read_report(folder)
            return report.blocks

    measured: dict[str, list[float]] = {}
    for number in range(arguments.rounds):
        for size in arguments.block_sizes:
            one = encoded[number : number + 1]
            ways = {
                "plain": lambda size=size, one=one: plain(model, one, size, length),
                "cached": lambda size=size, one=one: loop(model, one, size, length, 0),
                "batched": lambda size=size: loop(model, encoded[:32], size, length, 0),
                "collect": lambda size=size, number=number: collect(size, number * arguments.batch_size),
            }
            for name, way in ways.items():
                if name not in arguments.skip:
                    start = time.perf_counter()
                    blocks = way()
                    rate = blocks / (time.perf_counter() - start)
                    measured.setdefault(f"n{size}/{name}", []).append(rate)
                    print(f"n={size:<4}{name:10}{blocks:>6} blocks {rate:>8.2f} blocks/s", flush=True)
    result = {
        "model": arguments.model or DEMO_MODEL,
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": platform.processor(),
        "max_new_tokens": length,
        "batch_size": arguments.batch_size,
        "blocks_per_second": measured,
    }
    print_medians(measured, arguments.block_sizes)
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(result, indent=1))


def print_medians(measured: dict[str, list[float]], block_sizes: list[int]) -> None:
    """The median rate of each way, and the speed-up of collecting over each other way."""
    names = ("plain", "cached", "batched", "collect")
    print(f"\n{'medians':10}" + "".join(f"{name:>10}" for name in names))
    for size in block_sizes:
        rates = {name: statistics.median(measured.get(f"n{size}/{name}", [0.0])) for name in names}
        ratios = [f"{rates['collect'] / rates[name]:.1f}x {name}" for name in names[:-1] if rates[name]]
        print(f"n={size:<8}" + "".join(f"{rates[name]:>10.2f}" for name in names), "  ", ", ".join(ratios))


if __name__ == "__main__":
    main()
