"""
Speed-up of Jacobi decoding with default settings on SmolLM2, by prompt.

    python -m benchmarks.default_settings --dtype float32 --prompts 40
    python -m benchmarks.default_settings --dtype bfloat16 --prompts 40 --threads 2
    python -m benchmarks.default_settings --dtype bfloat16 --adapter src/hf_jacobi/checkpoints/smollm2-135m-draft

The base model with default settings is always measured. `--table` adds the base model with a table of n-grams, and
`--adapter` what a folder ships: a draft-only adapter with the settings beside it.

Chat, code, arithmetic and rewriting follow one another. AR and Jacobi decoding of a prompt take turns forward by
forward (`benchmarks/turns.py`), so that both meet the machine in the same state; `--repeats` adds further rounds. On
one thread of a busy machine, `--clock cpu` counts the time that the thread ran. The first call of Jacobi decoding
times forwards (`--given` sets the curve instead); that time is reported separately.
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
from benchmarks.turns import take_turns
from hf_jacobi.cli.demo_model import DEMO_MODEL
from hf_jacobi.cli.models import encode, load, sharing_weights, with_adapter
from hf_jacobi.decoding import timing
from hf_jacobi.decoding.costs import CPU
from hf_jacobi.decoding.mixin import unwrap
from hf_jacobi.evaluation.bench import described, setup_of
from hf_jacobi.evaluation.prompts import CHAT


REWRITING = (
    "Repeat this text word for word, three times:\n{}",
    "Correct the mistakes in this text and write it again:\n{}",
    "Write this text again in the past tense:\n{}",
    "Write this text again with longer names:\n{}",
)
WORST, TOTAL = 0.95, 1.0  # speed-ups that the default settings should reach


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


def raced(ways, inputs, arguments) -> dict[str, tuple[float, list[int], float]]:
    """The same for ways that take turns; the seconds are those of all repeats."""
    call = {**inputs, "do_sample": False, "max_new_tokens": arguments.max_new_tokens}
    clock, seconds = CLOCKS[arguments.clock], dict.fromkeys(ways, 0.0)
    for _ in range(arguments.repeats):
        runs = take_turns(ways, call, clock, arguments.threads)
        for name, (took, _) in runs.items():
            seconds[name] += took
    found = {}
    for name, (_, out) in runs.items():
        tokens = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        rate = out.jacobi_stats.tokens_per_forward if "jacobi_config" in ways[name][1] else 1.0
        found[name] = seconds[name], tokens, rate
    return found


def _jacobi(settings: dict) -> dict:
    return {"decoding": "jacobi", "jacobi_config": settings}


def run(arguments) -> dict:
    """Decodes every prompt both ways and prints each result at once."""
    torch.set_num_threads(arguments.threads)
    model, tokenizer = load(arguments.model, arguments.dtype)
    hf_jacobi.enable(model)
    given = {} if arguments.given is None else {"position_cost": json.loads(arguments.given)}
    # Calls that take turns must not share what a call changes in a model, so each has a copy.
    ways = {"AR": (model, {"decoding": "ar"}), "Jacobi": (sharing_weights(model), _jacobi(given))}
    if arguments.table:
        ways["table"] = sharing_weights(model), _jacobi(given | {"ngram_table": str(arguments.table)})
    if arguments.adapter:
        loaded = with_adapter(model, arguments.adapter)
        ways["adapter"] = hf_jacobi.enable(loaded.model), _jacobi(loaded.config.to_dict() | given)
    clock = CLOCKS[arguments.clock]
    first, once = encode(tokenizer, CHAT[0], model.device), {}
    for name, (served, how) in [*list(ways.items())[:1], *ways.items()]:
        once[name], *_ = clocked(served, first, 40, clock, **how)
    rows = []
    for kind, prompt in prompts(arguments.prompts):
        inputs = encode(tokenizer, prompt, model.device)
        runs = raced(ways, inputs, arguments)
        seconds, text, _ = runs.pop("AR")
        row = {"kind": kind, "tokens": len(text), "seconds": seconds}
        for name, (took, tokens, rate) in runs.items():
            faster = seconds / len(text) * len(tokens) / took  # per token: in half precision texts diverge
            row[name] = {"speedup": faster, "tokens_per_forward": rate, "identical": tokens == text}
        rows.append(row)
        figures = [
            f"  {name} {row[name]['speedup']:.3f}x TPF {row[name]['tokens_per_forward']:.2f}"
            + " *" * (not row[name]["identical"])
            for name in runs
        ]
        print(f"{kind:11}{len(text):>4} tokens  AR {seconds:6.2f} s{''.join(figures)}", flush=True)
    curves = {
        name: [[positions, round(cost, 2)] for positions, cost in found.curve(CPU).points]
        for name, (served, _) in ways.items()
        for found in timing._KNOWN.get(unwrap(served), {}).values()
    }
    extra = {name: took - once["AR"] for name, took in once.items() if name != "AR"}
    return {"setup": setup_of(model), "rows": rows, "costs": curves, "first_call": extra}


def summary(rows: list[dict], name: str) -> dict[str, float]:
    """Speed-ups of one way by total time: over all prompts, by kind, and of the worst prompt."""

    def of(some: list[dict]) -> float:
        return sum(row["seconds"] for row in some) / sum(row["seconds"] / row[name]["speedup"] for row in some)

    kinds = dict.fromkeys(row["kind"] for row in rows)
    by_kind = {kind: of([row for row in rows if row["kind"] == kind]) for kind in kinds}
    return {"total": of(rows), "worst": min(row[name]["speedup"] for row in rows)} | by_kind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"a local folder or a Hub id (default: {DEMO_MODEL})")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--clock", default="wall", choices=CLOCKS)
    parser.add_argument("--adapter", type=Path, help="folder of a draft-only adapter, to measure as well")
    parser.add_argument("--table", help="ngram_table of the base model, to measure as well")
    parser.add_argument("--given", help="position_cost as JSON, instead of a measured one")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args()
    report = run(arguments)
    rows = report["rows"]
    print(f"\n* another text than AR's\n{described(report['setup'])}; costs {report['costs']}")
    report["summary"] = {name: summary(rows, name) for name in rows[0] if isinstance(rows[0][name], dict)}
    for name, found in report["summary"].items():
        print(f"{name}: " + ", ".join(f"{what} {speedup:.3f}x" for what, speedup in found.items()), end="")
        print(f"; the first call took {report['first_call'][name]:.2f} s more than AR")
    print(f"wanted: total at least {TOTAL}x, worst prompt {WORST}x")
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
