"""
AR against Jacobi decoding with its default settings, on a model that was never trained for it: time, prompt by prompt.

    python -m benchmarks.default_settings --dtype float32 --prompts 40
    python -m benchmarks.default_settings --dtype bfloat16 --prompts 40 --threads 2

Chat, code, arithmetic and rewriting take turns. Each prompt is decoded by both in turn, as often as `--repeats` says,
and the fastest run of each counts, so that what else the machine does falls out. On one thread of a busy machine,
`--clock cpu` counts the time that the thread ran. The first call by Jacobi decoding times forwards (`--given` gives it
a curve instead); what that takes is told apart.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

import hf_jacobi
from benchmarks.decoding import COPIED
from benchmarks.smollm2.prompts import prompts as kept_prompts
from hf_jacobi.cli.demo_model import DEMO_MODEL
from hf_jacobi.cli.models import encode, load
from hf_jacobi.decoding import timing
from hf_jacobi.evaluation.bench import described, setup_of
from hf_jacobi.evaluation.prompts import CHAT


REWRITING = (
    "Repeat this text word for word, three times:\n{}",
    "Correct the mistakes in this text and write it again:\n{}",
    "Write this text again in the past tense:\n{}",
    "Write this text again with longer names:\n{}",
)
WORST, TOTAL = 1.05, 1.0  # times AR: what the default settings are to stay below


def prompts(count: int) -> list[tuple[str, str]]:
    """`(kind, prompt)`, the kinds in turn."""
    held_out = [(row["kind"], row["messages"][0]["content"]) for row in kept_prompts(held_out=True)]
    kinds = {
        "chat": CHAT,
        "code": [text for kind, text in held_out if kind == "code"],
        "arithmetic": [text for kind, text in held_out if kind == "arithmetic"],
        "rewriting": [form.format(text) for form in REWRITING for text in COPIED],
    }
    found = [
        (kind, texts[turn])
        for turn in range(max(map(len, kinds.values())))
        for kind, texts in kinds.items()
        if turn < len(texts)
    ]
    return found[:count]


CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}


def clocked(model, inputs, max_new_tokens: int, clock, **how) -> tuple[float, list[int], float]:
    """Seconds, tokens and tokens per forward of one greedy text."""
    begin = clock()
    out = model.generate(**inputs, **how, do_sample=False, max_new_tokens=max_new_tokens, return_dict_in_generate=True)
    seconds = clock() - begin
    tokens = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    return seconds, tokens, out.jacobi_stats.tokens_per_forward if "jacobi_config" in how else 1.0


def run(arguments) -> dict:
    """Decodes every prompt both ways, and prints each as it comes."""
    torch.set_num_threads(arguments.threads)
    model, tokenizer = load(arguments.model, arguments.dtype)
    hf_jacobi.enable(model)
    config = {} if arguments.given is None else {"position_cost": json.loads(arguments.given)}
    ways = {"ar": {"decoding": "ar"}, "jacobi": {"decoding": "jacobi", "jacobi_config": config}}
    clock = CLOCKS[arguments.clock]
    first = encode(tokenizer, CHAT[0], model.device)
    for _ in range(2):
        warm, *_ = clocked(model, first, 40, clock, **ways["ar"])
    timed, *_ = clocked(model, first, 40, clock, **ways["jacobi"])
    rows = []
    for kind, prompt in prompts(arguments.prompts):
        inputs = encode(tokenizer, prompt, model.device)
        runs = {name: [] for name in ways}
        for _ in range(arguments.repeats):
            for name, how in ways.items():
                runs[name].append(clocked(model, inputs, arguments.max_new_tokens, clock, **how))
        ar, jacobi = (min(runs[name]) for name in ways)
        rows.append(
            {
                "kind": kind,
                "tokens": len(ar[1]),
                "ar": ar[0],
                "jacobi": jacobi[0],
                "ratio": jacobi[0] / len(jacobi[1]) * len(ar[1]) / ar[0],  # per token: in half precision texts part
                "tokens_per_forward": jacobi[2],
                "identical": ar[1] == jacobi[1],
            }
        )
        row = rows[-1]
        print(
            f"{kind:11}{row['tokens']:>4} tokens  AR {ar[0]:6.2f} s  Jacobi {jacobi[0]:6.2f} s  {row['ratio']:.3f}x"
            f"  TPF {jacobi[2]:.2f}  {'' if row['identical'] else 'another text'}",
            flush=True,
        )
    known = timing._KNOWN.get(model, {})
    curves = [
        [[positions, round(cost, 2)] for positions, cost in curve.points]
        for tried in known.values()
        for curve in tried
    ]
    return {"setup": setup_of(model), "rows": rows, "costs": curves, "first_call": timed - warm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"a local folder or a Hub id (default: {DEMO_MODEL})")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--clock", default="wall", choices=CLOCKS)
    parser.add_argument("--given", help="position_cost, as JSON, in place of what is measured")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args()
    report = run(arguments)
    rows = report["rows"]
    total = sum(row["ratio"] * row["ar"] for row in rows) / sum(row["ar"] for row in rows)
    worst = max(row["ratio"] for row in rows)
    print(f"\n{described(report['setup'])}; costs {report['costs']}")
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = [row for row in rows if row["kind"] == kind]
        print(f"{kind:11} {sum(row['ratio'] * row['ar'] for row in own) / sum(row['ar'] for row in own):.3f}x")
    print(
        f"total {total:.3f}x (at most {TOTAL}), worst prompt {worst:.3f}x (at most {WORST}); the first call took "
        f"{report['first_call']:.2f} s more than AR"
    )
    if arguments.output:
        arguments.output.write_text(json.dumps(report | {"total": total, "worst": worst}, indent=1) + "\n")


if __name__ == "__main__":
    main()
