"""
AR and Jacobi decoding on the demo model or any other: tokens per forward, positions, time, identity of the texts.

    python -m benchmarks.decoding                                       # the README's table
    python -m benchmarks.decoding --prompts 40 --max-new-tokens 128 --only default n16-recycling
    python -m benchmarks.decoding --mixed --only default n4 n4-nopool n8 n8-nopool n16-recycling n16-sliding
    python -m benchmarks.decoding --dtype bfloat16 --prompts 40 --max-new-tokens 128 --only default n16-recycling

The configurations take turns on each prompt, so that a machine that slows down affects all of them. Results are
written to `--output` after each prompt, and an interrupted run continues after the last prompt written.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch
import transformers

import hf_jacobi
from hf_jacobi.cli.demo_model import DEMO_MODEL
from hf_jacobi.cli.models import encode, load, with_adapter
from hf_jacobi.evaluation.prompts import CHAT


PAPER = {"max_blocks": 2, "spawn_ratio": 0.85, "pool_size": 4}  # multi-block and recycling as the paper recommends
CONFIGS: dict[str, dict | None] = {
    "ar": None,
    "default": {},
    "n4": {"block_size": 4},
    "n4-nopool": {"block_size": 4, "pool_size": 0},
    "n8": {"block_size": 8},
    "n8-nopool": {"block_size": 8, "pool_size": 0},
    "n16-vanilla": {"block_size": 16, "window": "block", "pool_size": 0, "draft_init": "prompt"},
    "n16-sliding": {"block_size": 16, "pool_size": 0},
    "n16-recycling": {"block_size": 16, "pool_size": 4},
    "n16": {"block_size": 16} | PAPER,
    "n32-vanilla": {"block_size": 32, "window": "block", "pool_size": 0, "draft_init": "prompt"},
    "n32-sliding": {"block_size": 32, "pool_size": 0},
    "n32": {"block_size": 32} | PAPER,
    "n64": {"block_size": 64} | PAPER,
    "n16-block-K1": {"block_size": 16, "window": "block"} | PAPER | {"max_blocks": 1},
    "n16-block-K2": {"block_size": 16, "window": "block"} | PAPER,
    "n16-block-K3": {"block_size": 16, "window": "block"} | PAPER | {"max_blocks": 3},
    "n16-block-K1-nopool": {"block_size": 16, "window": "block", "pool_size": 0, "max_blocks": 1},
    "n16-block-K2-nopool": {"block_size": 16, "window": "block", "pool_size": 0, "max_blocks": 2},
    "n16-block-K3-nopool": {"block_size": 16, "window": "block", "pool_size": 0, "max_blocks": 3},
}

COPIED = (
    "def area(width, height):\n    if width < 0 or height < 0:\n        raise ValueError('negative')\n"
    "    return width * height",
    "Anna has a cat. Ben has a dog. Clara has a horse. David has a bird. Emma has a fish.",
    "Monday: soup. Tuesday: rice. Wednesday: pasta. Thursday: salad. Friday: fish. Saturday: pizza.",
)
MIXED = [
    prompt
    for number, text in enumerate(COPIED)
    for prompt in (*CHAT[3 * number : 3 * number + 3], f"Repeat this text word for word, three times:\n{text}")
]


def decode(model, tokenizer, prompt: str, config: dict | None, max_new_tokens: int) -> dict:
    """Decodes one prompt greedily and returns the figures."""
    inputs = encode(tokenizer, prompt, model.device)
    arguments = {} if config is None else {"jacobi_config": config}
    start = time.perf_counter()
    out = model.generate(
        **inputs,
        **arguments,
        decoding="ar" if config is None else "jacobi",
        do_sample=False,
        max_new_tokens=max_new_tokens,
        return_dict_in_generate=True,
    )
    seconds = time.perf_counter() - start
    tokens = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    stats = None if config is None else out.jacobi_stats
    return {
        "tokens": tokens,
        "seconds": seconds,
        "forwards": len(tokens) if stats is None else stats.forwards,
        "positions": len(tokens) if stats is None else stats.positions,
        "recycled_tokens": 0 if stats is None else stats.recycled_tokens,
    }


def run(arguments) -> dict:
    """Decodes all prompts with all configurations, continuing where the output file ends."""
    model, tokenizer = load(arguments.model, arguments.dtype)
    if arguments.adapter:
        model = with_adapter(model, arguments.adapter).model
    hf_jacobi.enable(model)
    prompts = (MIXED if arguments.mixed else CHAT)[: arguments.prompts]
    names = ["ar", *(arguments.only or [name for name in CONFIGS if name != "ar"])]
    setup = {
        "model": arguments.model or DEMO_MODEL,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "prompts": f"{len(prompts)} mixed" if arguments.mixed else len(prompts),
        "max_new_tokens": arguments.max_new_tokens,
        "configs": {name: CONFIGS[name] for name in names},
    }
    if arguments.adapter:
        setup["adapter"] = arguments.adapter.name
    path = Path(arguments.output)
    result = json.loads(path.read_text()) if path.exists() else {"setup": setup, "runs": []}
    if result["setup"] != setup:
        raise SystemExit(f"{path} holds another measurement: name another file with --output, or delete it.")
    decode(model, tokenizer, CHAT[0], None, 8)  # warm-up
    for prompt in prompts[len(result["runs"]) :]:
        runs = {name: decode(model, tokenizer, prompt, CONFIGS[name], arguments.max_new_tokens) for name in names}
        result["runs"].append({"prompt": prompt, "runs": runs})
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result) + "\n")
        print(f"{len(result['runs'])}/{len(prompts)}", end="\r", flush=True)
    return result


def first_difference(a: list[int], b: list[int]) -> int | None:
    """Index of the first token that differs, or `None`."""
    if a == b:
        return None
    return next((i for i, pair in enumerate(zip(a, b)) if pair[0] != pair[1]), min(len(a), len(b)))


def table(result: dict) -> str:
    """The measurement as a Markdown table."""
    rows = [
        "| configuration | TPF | positions/token | ms/token | speed-up | worst prompt | identical texts |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    runs = [prompt["runs"] for prompt in result["runs"]]
    for name in result["setup"]["configs"]:
        total = {key: sum(run[name][key] for run in runs) for key in ("seconds", "forwards", "positions")}
        tokens = sum(len(run[name]["tokens"]) for run in runs)
        pace = [run[name]["seconds"] / len(run[name]["tokens"]) for run in runs]
        ar_pace = [run["ar"]["seconds"] / len(run["ar"]["tokens"]) for run in runs]
        ar_total = sum(run["ar"]["seconds"] for run in runs) / sum(len(run["ar"]["tokens"]) for run in runs)
        same = sum(run[name]["tokens"] == run["ar"]["tokens"] for run in runs)
        rows.append(
            f"| {name} | {tokens / total['forwards']:.2f} | {total['positions'] / tokens:.1f} "
            f"| {1000 * total['seconds'] / tokens:.1f} | {ar_total * tokens / total['seconds']:.2f}x "
            f"| {min(b / a for a, b in zip(pace, ar_pace)):.2f}x | {same} of {len(runs)} |"
        )
    return "\n".join(rows)


def differences(result: dict) -> str:
    """Where texts begin to differ from AR's."""
    lines = []
    for name in result["setup"]["configs"]:
        places = [first_difference(run["runs"][name]["tokens"], run["runs"]["ar"]["tokens"]) for run in result["runs"]]
        places = [place for place in places if place is not None]
        if places:
            lines.append(f"{name}: {len(places)} texts differ, first at new token {sorted(places)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"a local folder or a Hub id (default: {DEMO_MODEL})")
    parser.add_argument("--adapter", type=Path, help="the folder of an adapter for all tokens")
    parser.add_argument(
        "--mixed", action="store_true", help="chat prompts and texts to copy in turn, instead of chat prompts alone"
    )
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument(
        "--prompts",
        type=int,
        default=12,
        help=f"how many of the {len(CHAT)} prompts, or of {len(MIXED)} mixed ones (default: 12)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--only", nargs="*", choices=[name for name in CONFIGS if name != "ar"])
    parser.add_argument("--output", default="benchmarks/results/decoding.json")
    result = run(parser.parse_args())
    print(table(result))
    print(differences(result))


if __name__ == "__main__":
    main()
