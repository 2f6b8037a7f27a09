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
CUT = {"accept_cut": True}
REFRESHES, REFRESHED = 4, 500  # parts of a training with `-refresh`, and the prompts of each part after the first
# name -> (settings of `JacobiForcingConfig`, where the noise comes from, noisy copies of each text)
VARIANTS: dict[str, tuple[dict, str, int]] = {
    "soft": ({}, "trajectories", 1),
    "kl": ({"consistency_loss": "kl"}, "trajectories", 1),
    "hard": ({"consistency_loss": "hard"}, "trajectories", 1),
    "tv": ({"consistency_loss": "tv"}, "trajectories", 1),
    "lk": ({"consistency_loss": "lk"}, "trajectories", 1),
    "soft-cut": (CUT, "trajectories", 1),
    "kl-cut": (CUT | {"consistency_loss": "kl"}, "trajectories", 1),
    "hard-cut": (CUT | {"consistency_loss": "hard"}, "trajectories", 1),
    "tv-cut": (CUT | {"consistency_loss": "tv"}, "trajectories", 1),
    "lk-cut": (CUT | {"consistency_loss": "lk"}, "trajectories", 1),
    "soft-0.8": ({"block_position_weight": 0.8}, "trajectories", 1),
    "lk-0.8": ({"consistency_loss": "lk", "block_position_weight": 0.8}, "trajectories", 1),
    "soft-uniform": ({}, "uniform", 1),
    "lk-uniform": ({"consistency_loss": "lk"}, "uniform", 1),
    "soft-corrupt": ({}, "corrupt", 1),
    "soft-copies": ({}, "trajectories", 4),
    "lk-copies": ({"consistency_loss": "lk"}, "trajectories", 4),
    "soft-uniform-copies": ({}, "uniform", 4),
    "soft-refresh": ({}, "refresh", 1),
}


def rows_of(trajectories, base: Path, noise: str, copies: int, window: int):
    """Packed rows; a window of 1 has clean context, as for CLLM and the miniature's draft-only adapter."""
    if noise in ("trajectories", "refresh"):
        return hf_jacobi.pack_trajectories(trajectories, window, "random", max_length=1024, noisy_copies=copies)
    return hf_jacobi.pack_completions(
        trajectories,
        load_tokenizer(base),
        BLOCK,
        noise,
        max_length=1024,
        noisy_copies=copies,
    )


def train(arguments, base: Path, trajectories, name: str) -> tuple[Path, float]:
    """Trains one variant; returns its folder and the seconds of its steps."""
    settings, noise, copies = VARIANTS[name]
    draft = arguments.scope == "draft"
    steps = max(1, arguments.steps // copies) if arguments.equal_noise else arguments.steps
    context = f"-w{arguments.window}" if arguments.window > 1 else ""
    folder = arguments.folder / f"{arguments.scope}-{name}{context}-{steps}"
    if (folder / "seconds").exists():
        return folder, float((folder / "seconds").read_text())
    rows = one_after_another([(rows_of(trajectories, base, noise, copies, arguments.window), BATCH_SIZE * steps)])
    refresh = None
    if noise == "refresh":
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
            per_device_train_batch_size=BATCH_SIZE,
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
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["soft", "tv", "lk", "soft-cut", "lk-cut"])
    parser.add_argument("--base-problems", type=int, default=24_000)
    parser.add_argument("--prompts", type=int, default=1_500)
    parser.add_argument("--steps", type=int, default=600, help="of four texts")
    parser.add_argument("--equal-noise", action="store_true", help="with several noisy copies of a text, fewer steps")
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
