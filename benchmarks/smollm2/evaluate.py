"""
A Jacobi-forced SmolLM2 compared with the model it was trained from: tokens per forward, time, text, perplexity.

    python -m benchmarks.smollm2.evaluate FOLDER held_out.jsonl

writes FOLDER/evaluation.json, from which `hf-jacobi push FOLDER ...` makes the card.

Each prompt is decoded on its own, by each way in turn: AR, transformers' prompt lookup, Jacobi decoding of the base
model with default settings and with those of the trained model, Jacobi decoding of the trained model, and AR of the
trained model unless its text is always the base model's. In-domain prompts are held-out prompts of the kinds it was
trained on; out-of-domain prompts are chat prompts (`src/hf_jacobi/evaluation/prompts.py`).
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

import hf_jacobi
from hf_jacobi import JacobiConfig
from hf_jacobi.cli.models import DEMO_ADAPTER, Adapted, encode, load, with_adapter
from hf_jacobi.decoding.ngram_table import TABLE
from hf_jacobi.evaluation.bench import setup_of
from hf_jacobi.evaluation.measuring import AR, PROMPT_LOOKUP, Measured, Method, compare, race
from hf_jacobi.evaluation.prompts import CHAT
from hf_jacobi.hub.card import EVALUATION

from .ship import CARD, card


TITLES = {"code": "code, held out", "arithmetic": "arithmetic, held out", "instructions": "instructions, held out"}
OTHER = "other kinds, held out"
TRAINED, OWN = "Jacobi, trained", "AR, trained"
SAME = "Jacobi, before, same settings"
OUT_OF_DOMAIN = "chat, other prompts"


def trained(path: Path, base) -> Adapted:
    """The trained model: an adapter on the base, or a whole model."""
    if (path / "adapter_config.json").exists():
        return with_adapter(base, path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=base.dtype).eval()
    return Adapted(model, model, JacobiConfig.coerce(model.generation_config.jacobi))


@torch.no_grad()
def perplexity(model, texts: list[tuple[list[int], list[int]]]) -> float:
    """Perplexity of completions given their prompts, by causal forwards of the model."""
    loss, count = 0.0, 0
    for prompt, completion in texts:
        ids = torch.tensor([prompt + completion], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        loss += torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum").item()
        count += len(completion)
    return math.exp(loss / count)


def measure(arguments) -> dict:
    """All figures, by kind of prompt and for all in-domain prompts."""
    base, tokenizer = load(arguments.model, arguments.dtype)
    hf_jacobi.enable(base)
    loaded = trained(arguments.trained, base)
    model, config = hf_jacobi.enable(loaded.model), loaded.config
    draft_only = hasattr(model, "peft_config")  # other adapters are merged
    prompts: dict[str, list[str]] = {}
    for line in arguments.held_out.read_text().splitlines():
        row = json.loads(line)
        prompts.setdefault(TITLES.get(row["kind"], OTHER), []).append(row["messages"][0]["content"])
    prompts[OUT_OF_DOMAIN] = list(CHAT)
    same = config.to_dict()
    if config.ngram_table == TABLE:  # which lies beside the adapter, not beside the base model
        same["ngram_table"] = str(arguments.trained)
    contestants = {
        "AR": (base, AR),
        "prompt lookup": (base, PROMPT_LOOKUP),
        "Jacobi, before, default": (base, Method("", "jacobi", {})),
        **({} if config == JacobiConfig() else {SAME: (base, Method("", "jacobi", same))}),
        TRAINED: (model, Method(TRAINED, "jacobi", config.to_dict())),
        **({} if draft_only else {OWN: (loaded.writer, AR)}),
    }
    figures, runs, texts = [], {}, []
    for kind, found in prompts.items():
        inputs = [encode(tokenizer, prompt, base.device) for prompt in found[: arguments.prompts]]
        raced = race(contestants, inputs, arguments.max_new_tokens)
        runs[kind] = list(tqdm(raced, desc=kind, total=len(inputs)))
        texts += [(x["input_ids"][0].tolist(), run["AR"].tokens[0]) for x, run in zip(inputs, runs[kind])]
        figures += rows(kind, runs[kind])
        if kind == list(prompts)[-2]:
            figures += rows("in domain, held out", [run for found in runs.values() for run in found])
    ppl = {"perplexity_before": perplexity(base, texts), "perplexity_after": perplexity(model, texts)}
    figures.append({"dataset": "all texts above", "decoding": "AR", "metrics": ppl})
    setup = setup_of(base)
    return {
        "measured_on": f"{setup['device']}, {setup['threads']} threads, {setup['dtype']}, torch {setup['torch']}, "
        f"transformers {setup['transformers']}; {arguments.prompts} prompts of each "
        f"kind, at most {arguments.max_new_tokens} new tokens, one prompt at a time, speed-up over AR in the same run",
        "draft_only": draft_only,
        "results": figures,
    }


def rows(dataset: str, runs: list[dict[str, Measured]]) -> list[dict]:
    """One entry per way of decoding; `exact` is the share of texts identical to AR's by the same model."""
    kept = ("tokens_per_forward", "speedup", "slowest", "tokens_per_second", "positions_per_token", "identical")
    found = compare(runs)
    own = compare([{OWN: run[OWN], TRAINED: run[TRAINED]} for run in runs]) if OWN in runs[0] else found
    entries = []
    for name, values in found.items():
        metrics = {key: round(values[key], 4) for key in kept}
        if name == TRAINED:
            metrics["exact"] = round(own[name]["identical"], 4)
        entries.append({"dataset": dataset, "decoding": name, "metrics": metrics})
    return entries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trained", type=Path, help="the folder of an adapter or a model")
    parser.add_argument("held_out", type=Path, help="held_out.jsonl of benchmarks.smollm2.prompts")
    parser.add_argument("--model", help="the model it was trained from (default: the demo model)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--prompts", type=int, default=20, help="prompts of each kind (default: 20)")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    arguments = parser.parse_args()
    result = measure(arguments)
    (arguments.trained / EVALUATION).write_text(json.dumps(result, indent=1) + "\n")
    if arguments.trained.resolve() == DEMO_ADAPTER:
        CARD.write_text(card())
    for row in result["results"]:
        print(row["dataset"], row["decoding"], row["metrics"], sep=" | ")


if __name__ == "__main__":
    main()
