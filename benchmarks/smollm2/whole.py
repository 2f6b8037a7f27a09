"""
Trains all weights of SmolLM2-135M-Instruct by the paper's method, and compares speed and text with the base model.

    python -m benchmarks.smollm2.prompts prompts
    hf-jacobi collect --dataset prompts/train.jsonl --output-dir trajectories --block-size 16 --max-new-tokens 96 \
        --batch-size 32 --dtype float32 --max-prompts 320
    python -m benchmarks.smollm2.whole trajectories trained prompts/held_out.jsonl --steps 100

One phase at the block size of the trajectories: windows of 16 blocks, linear noise, soft consistency loss and the loss
on the text. The figures of both models go into `trained/quality.json`: TPF, the share of the base model's text that is
kept up to the first other token (agreement), the perplexity of the base model's texts, and the share of arithmetic
problems solved. An interrupted training resumes from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

import torch
from transformers.trainer_utils import get_last_checkpoint

import hf_jacobi
from benchmarks.smollm2.evaluate import perplexity
from benchmarks.smollm2.prompts import ITEMS, NAMES
from hf_jacobi.cli.models import encode, load
from hf_jacobi.decoding.drafting import matching_prefix
from hf_jacobi.trajectories.prompts import open_prompts


WINDOW = 16  # blocks, the paper's
WAYS = {
    "blocks of 16": {"block_size": 16, "window": "block", "draft_init": "prompt", "pool_size": 0},
    "sliding window of 16, recycling": {"block_size": 16},
}
IN_DOMAIN = ("code", "arithmetic", "instructions")
PROBLEMS = (
    ("{name} has {a} {item} and buys {b} more. How many {item} does {name} have now?", lambda a, b: a + b),
    ("{name} had {a} {item} and lost {b} of them. How many {item} are left?", lambda a, b: a - b),
    ("A box holds {a} {item}. How many {item} are there in {b} boxes?", lambda a, b: a * b),
)


def problems(count: int) -> list[tuple[str, int]]:
    """`(question, answer)`, the kinds in turn, always the same ones."""
    draw, found = random.Random(0), []
    for number in range(count):
        form, answer = PROBLEMS[number % len(PROBLEMS)]
        a, b = draw.randrange(10, 30), draw.randrange(2, 10)
        found.append((form.format(name=draw.choice(NAMES), item=draw.choice(ITEMS), a=a, b=b), answer(a, b)))
    return found


def is_solved(text: str, answer: int) -> bool:
    """Whether the last number of a text is the answer."""
    numbers = re.findall(r"\d+", text.replace(",", ""))
    return bool(numbers) and int(numbers[-1]) == answer


def texts(model, tokenizer, questions: list[str], new_tokens: int, **how) -> tuple[list[list[int]], int]:
    """The greedy answers to all questions, one at a time, and the number of forwards that Jacobi decoding took."""
    answers, forwards = [], 0
    for question in questions:
        inputs = encode(tokenizer, question, model.device)
        out = model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens, return_dict_in_generate=True, **how)
        answers.append(out.sequences[0, inputs["input_ids"].shape[1] :].tolist())
        forwards += out.jacobi_stats.forwards if how["decoding"] == "jacobi" else 0
    return answers, forwards


def quality(model, tokenizer, questions: list[str], new_tokens: int, count: int, before=None) -> dict:
    """
    The figures of a model.

    Args:
        count: the number of arithmetic problems.
        before: the answers of the base model; the model's own without them.
    """
    answers, _ = texts(model, tokenizer, questions, new_tokens, decoding="ar")
    before = before or answers
    prompts_of = [encode(tokenizer, question, model.device)["input_ids"][0].tolist() for question in questions]
    figures: dict = {"answers": answers, "perplexity": perplexity(model, list(zip(prompts_of, before)))}
    kept = sum(matching_prefix(answer, old) for answer, old in zip(answers, before))
    figures["agreement"] = kept / sum(map(len, before))
    for name, config in WAYS.items():
        found, forwards = texts(
            model, tokenizer, questions, new_tokens, decoding="jacobi", jacobi_config=hf_jacobi.JacobiConfig(**config)
        )
        figures[name] = {
            "tokens_per_forward": sum(map(len, found)) / forwards,
            "identical": sum(one == other for one, other in zip(found, answers)) / len(answers),
        }
    asked = problems(count)
    solved, _ = texts(model, tokenizer, [question for question, _ in asked], 64, decoding="ar")
    figures["solved"] = sum(
        is_solved(tokenizer.decode(ids, skip_special_tokens=True), answer) for ids, (_, answer) in zip(solved, asked)
    ) / len(asked)
    return figures


def train(model, tokenizer, arguments) -> None:
    """Trains all weights in place."""
    trajectories = open_prompts(arguments.trajectories)
    packed = hf_jacobi.pack_trajectories(trajectories, WINDOW, "linear", max_length=1536)
    training = arguments.output / "training"
    trainer = hf_jacobi.JacobiForcingTrainer(
        model,
        hf_jacobi.JacobiForcingConfig(
            str(training),
            per_device_train_batch_size=arguments.rows,
            max_steps=arguments.steps,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            ar_loss_weight=arguments.ar_loss_weight,
            use_cpu=not torch.cuda.is_available(),
            save_steps=25,
            save_total_limit=1,
            logging_steps=5,
            report_to="none",
            seed=0,
        ),
        train_dataset=packed,
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=training.is_dir() and get_last_checkpoint(str(training)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trajectories", help="the folder that `hf-jacobi collect` wrote")
    parser.add_argument("output", type=Path)
    parser.add_argument("held_out", type=Path, help="held-out prompts, one JSON object a line")
    parser.add_argument("--model", help="the base model (default: the demo model)")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=4, help="in a step")
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--ar-loss-weight", type=float, default=1.0)
    parser.add_argument("--prompts", type=int, default=5, help="held-out prompts of each kind")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--problems", type=int, default=60)
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.model, "float32")
    hf_jacobi.enable(model)
    rows = [json.loads(line) for line in arguments.held_out.read_text().splitlines()]
    questions = [
        row["messages"][0]["content"]
        for kind in IN_DOMAIN
        for row in [row for row in rows if row["kind"] == kind][: arguments.prompts]
    ]
    how = tokenizer, questions, arguments.max_new_tokens, arguments.problems
    found = {"base": quality(model, *how)}
    train(model, tokenizer, arguments)
    model.eval()
    found["trained"] = quality(model, *how, before=found["base"]["answers"])
    for name, figures in found.items():
        del figures["answers"]
        print(name, json.dumps(figures), flush=True)
    (arguments.output / "quality.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
