"""
What a model learns to draft from: losses and rows compared, with the same base model, texts, steps and seed.

    python -m benchmarks.learning --variants soft tv lk lk-cut            # a draft-only adapter
    python -m benchmarks.learning --scope whole --variants soft lk --window 4 --problems 200    # the whole model
    python -m benchmarks.learning --scope whole --variants soft soft-refresh    # fresh trajectories while it trains

The base model is the miniature's (`benchmarks/miniature`), trained on fewer problems so that it is ready in a quarter
of an hour; `--base-problems 120000` trains it fully. Everything is kept in `--folder`, where an interrupted run
resumes. Tokens per forward (TPF) are given for a sliding window of 16, over all validation problems and over the
solved ones only, and for plain blocks of 16. Seconds are processor time, for the training steps and for the
trajectories collected between them.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from transformers.utils import logging

import hf_jacobi
from hf_jacobi.evaluation.measuring import AR

from .miniature.base import train_base
from .miniature.evaluate import MAX_NEW_TOKENS, answer, summary
from .miniature.forcing import BATCH_SIZE, completions, load, load_tokenizer, one_after_another
from .miniature.recipes import in_blocks, sliding
from .miniature.tasks import training_problems


BLOCK = 16
REFRESHES, REFRESHED = 4, 500  # parts of a training with `-refresh`, and the prompts of each part after the first
COPIES = 4
LOSSES = ("soft", "kl", "hard", "tv", "lk")
PARTS = {
    "cut": {"accept_cut": True},
    "0.8": {"block_position_weight": 0.8},
    "copies": {},  # several noisy copies of each text
    "uniform": {},  # noise from the vocabulary instead of trajectories
    "corrupt": {},  # the true tokens, some of them replaced by such noise
    "refresh": {},  # fresh trajectories while the model trains
}


@dataclass(frozen=True)
class Variant:
    """
    What is compared, from a name such as `lk-cut-copies`.

    Args:
        settings: arguments of `JacobiForcingConfig`.
        noise: where the noise comes from.
        copies: noisy copies of each text.
    """

    settings: dict
    noise: str
    copies: int

    @classmethod
    def of(cls, name: str) -> Variant:
        """The variant that a name describes: a loss, and any of `PARTS`, separated by hyphens."""
        loss, *parts = name.split("-")
        if loss not in LOSSES or not set(parts) <= set(PARTS):
            raise argparse.ArgumentTypeError(
                f"{name!r} is not one of {', '.join(LOSSES)} with any of -{', -'.join(PARTS)}"
            )
        settings = {key: value for part in parts for key, value in PARTS[part].items()}
        noise = next((part for part in ("uniform", "corrupt", "refresh") if part in parts), "trajectories")
        return cls({"consistency_loss": loss} | settings, noise, COPIES if "copies" in parts else 1)


def variant_name(name: str) -> str:
    """A name that `Variant.of` reads."""
    Variant.of(name)
    return name


def rows_of(arguments, trajectories, base: Path, variant: Variant, count: int):
    """
    Packed rows in the order of the training, with other noise in each epoch. A window of 1 has clean context, as for
    CLLM and the miniature's draft-only adapter.
    """
    parts = []
    for seed, first in enumerate(range(0, count, len(trajectories))):
        settings = {"max_length": 2048, "noisy_copies": variant.copies, "seed": seed}
        if variant.noise in ("trajectories", "refresh"):
            rows = hf_jacobi.pack_trajectories(trajectories, arguments.window, "random", **settings)
        else:
            rows = hf_jacobi.pack_completions(trajectories, load_tokenizer(base), BLOCK, variant.noise, **settings)
        parts.append((rows, min(len(trajectories), count - first)))
    return one_after_another(parts)


def train(arguments, base: Path, trajectories, name: str) -> tuple[Path, float]:
    """Trains one variant; returns its folder and the seconds of its steps."""
    variant = Variant.of(name)
    settings = variant.settings
    draft = arguments.scope == "draft"
    context = f"-w{arguments.window}" if arguments.window > 1 else ""
    what = f"{arguments.scope}-{name}{context}-{arguments.steps}x{arguments.texts}-{arguments.learning_rate:g}"
    folder = arguments.folder / what
    if (folder / "seconds").exists():
        return folder, float((folder / "seconds").read_text())
    steps = arguments.steps
    rows = rows_of(arguments, trajectories, base, variant, arguments.texts * steps)
    refresh = None
    if variant.noise == "refresh":
        settings = settings | {"refresh_steps": max(1, steps // REFRESHES)}
        fresh = [{"prompt": problem.prompt} for problem in training_problems(REFRESHED * REFRESHES, "refresh")]
        refresh = hf_jacobi.Refresh(
            fresh,
            count=min(REFRESHED, arguments.prompts),
            max_new_tokens=MAX_NEW_TOKENS,
            window_size=arguments.window,
            collect={"batch_size": 64},
            pack={"noise_schedule": "random", "max_length": 1024},
        )
    trainer = hf_jacobi.JacobiForcingTrainer(
        model=str(base),
        args=hf_jacobi.JacobiForcingConfig(
            output_dir=str(folder / "training"),
            per_device_train_batch_size=arguments.texts,
            max_steps=steps,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=min(100, steps // 20),
            adam_beta2=0.98,
            ar_loss_weight=arguments.ar_loss_weight,
            ar_loss_weight_start=1.0 if arguments.ar_loss_weight > 1 and not draft else None,
            train_sampling_strategy="sequential",
            adapter_scope="draft" if draft else "all",
            compile_layers=arguments.compile,
            block_size=BLOCK,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            seed=0,
            model_init_kwargs={"attn_implementation": "eager"},
            **settings,
        ),
        train_dataset=rows,
        processing_class=load_tokenizer(base) if refresh else None,
        refresh=refresh,
        peft_config=LoraConfig(r=128, lora_alpha=128, target_modules="all-linear", task_type="CAUSAL_LM")
        if draft
        else None,
    )
    begin = time.process_time()
    trainer.train()
    seconds = time.process_time() - begin
    trainer.save_model(str(folder))
    (folder / "seconds").write_text(str(seconds))
    return folder, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/learning"))
    parser.add_argument("--scope", choices=("draft", "whole"), default="draft")
    parser.add_argument("--variants", nargs="+", type=variant_name, default=["soft", "tv", "lk", "soft-cut", "lk-cut"])
    parser.add_argument("--base-problems", type=int, default=24_000)
    parser.add_argument("--prompts", type=int, default=1_500)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--texts", type=int, default=BATCH_SIZE, help="in a step")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--ar-loss-weight", type=float, default=30.0, help="of whole models; grows from 1")
    parser.add_argument("--window", type=int, default=1, help="w of the rows; 1 is clean context")
    parser.add_argument("--compile", action="store_true", help="compile the layers")
    parser.add_argument("--problems", type=int, default=60, help="to validate on")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    base = arguments.folder / "base"
    if not (base / "config.json").exists():
        train_base(base, arguments.base_problems)
    folder = arguments.folder / f"trajectories-{arguments.prompts}"
    trajectories = completions(base, arguments.prompts, BLOCK, folder)
    tokenizer = load_tokenizer(base)
    problems = training_problems(arguments.problems, "validation")
    before = answer(load(base), tokenizer, problems, AR)
    report = {"base": summary(before, before)["both"]}
    print(json.dumps(report), flush=True)
    print(f"{'':22}{'TPF':>7}{'solved':>8}{'blocks':>8}{'math':>7}{'sql':>7}{'seconds':>9}", flush=True)
    for name in arguments.variants:
        folder, seconds = train(arguments, base, trajectories, name)
        model = load(folder, base)
        answers = answer(model, tokenizer, problems, sliding(BLOCK))
        by_task = summary(answers, before)
        solved = [row for row in answers if row["solved"]]
        found = by_task["both"] | {
            "seconds": seconds,
            "of_solved": sum(len(row["tokens"]) for row in solved) / max(1, sum(row["forwards"] for row in solved)),
            "blocks": summary(answer(model, tokenizer, problems, in_blocks(BLOCK)), before)["both"][
                "tokens_per_forward"
            ],
            "solved": {task: figures["solve_rate"] for task, figures in by_task.items()},
        }
        report[name] = found
        figures = f"{found['tokens_per_forward']:7.2f}{found['of_solved']:8.2f}{found['blocks']:8.2f}"
        tasks = "".join(f"{found['solved'].get(task, 0):7.1%}" for task in ("math", "sql"))
        print(f"{name:22}{figures}{tasks}{seconds:9.0f}", flush=True)
        if arguments.output:
            arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
