"""Training at the shape of a 1.5B model: a step of Jacobi Forcing compared with one of plain fine-tuning."""

from __future__ import annotations

import tempfile
import time
from itertools import pairwise
from statistics import median

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks.training import made_up_trajectories
from hf_jacobi import JacobiForcingConfig, JacobiForcingTrainer
from hf_jacobi.trajectories.packing import PackSettings, packed_rows

from .chain import QWEN_1_5B, TOY, shaped_model
from .stage import Stage
from .timing import peak_memory, synchronize


def run(stage: Stage) -> None:
    """All figures; ways that need no compilation come first."""
    shape, length, steps = (TOY, 128, 2) if stage.dry else (QWEN_1_5B, 4096, 4)
    for way in ("fine-tuning", "forcing, windows", "forcing, dense", "draft-only, windows", "forcing, flex"):
        if way == "forcing, flex" and not stage.on_gpu:
            stage.content["skipped"][way] = "FlexAttention has no backward pass on a CPU"
            continue
        stage.measure(way, train, way, shape, stage.device, length, steps, needs=12)


class StepClock(TrainerCallback):
    """Records when each step ended."""

    def __init__(self):
        self.times: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        """Waits for the device, so that each step is timed separately."""
        synchronize()
        self.times.append(time.perf_counter())


def train(way: str, shape: dict, device: torch.device, length: int, steps: int) -> dict:
    """
    Runs a few steps in mixed precision, each on one row of `length` tokens: text for plain fine-tuning, otherwise text
    and noise.

    Returns:
        `ms_per_step` (the median without the first), `tokens_per_second`, `text_tokens_per_second`, `loss` (the last),
        `peak_gib`.
    """
    dry = device.type == "cpu"
    dtype = torch.bfloat16 if way.startswith("draft-only") and not dry else torch.float32
    model = shaped_model(shape, device, dtype, "flex_attention" if way.endswith("flex") else "sdpa").train()
    figure: dict = {}
    with tempfile.TemporaryDirectory() as folder, peak_memory(figure):
        settings = {
            "output_dir": folder,
            "report_to": "none",
            "disable_tqdm": True,
            "per_device_train_batch_size": 1,
            "max_steps": steps,
            "logging_steps": 1,
            "save_strategy": "no",
            "bf16": not dry,
            "use_cpu": dry,
        }
        trainer, tokens, text = _trainer(way, model, settings, length, steps)
        clock = StepClock()
        trainer.add_callback(clock)
        trainer.train()
    seconds = median(after - before for before, after in pairwise(clock.times))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return figure | {
        "ms_per_step": 1000 * seconds,
        "tokens_per_second": tokens / seconds,
        "text_tokens_per_second": text / seconds,
        "loss": losses[-1],
    }


def _trainer(way: str, model, settings: dict, length: int, steps: int):
    """The trainer, the number of tokens in a row, and how many of them are text."""
    vocabulary, prompt = model.config.vocab_size, min(64, length // 4)
    if way == "fine-tuning":
        rows = made_up_trajectories(steps, length - prompt, prompt=prompt, vocabulary=vocabulary)
        texts = [row["prompt_ids"] + row["completion_ids"] for row in rows]
        labels = [[-100] * prompt + row["completion_ids"] for row in rows]
        data = Dataset.from_dict({"input_ids": texts, "labels": labels})
        return Trainer(model, TrainingArguments(**settings), _collate, data), length, length
    text = (length - prompt) // 2 // 16 * 16
    rows = made_up_trajectories(steps, text, prompt=prompt, vocabulary=vocabulary)
    packed = list(packed_rows(rows, PackSettings(16, "linear", 0.0, 1.0, None, False, 0)))
    draft = way.startswith("draft-only")
    adapter = LoraConfig(r=64, lora_alpha=128, target_modules="all-linear") if draft else None
    arguments = JacobiForcingConfig(**settings, adapter_scope="draft" if draft else "all")
    trainer = JacobiForcingTrainer(model, arguments, Dataset.from_list(packed), peft_config=adapter)
    if way == "forcing, dense":
        trainer.windowed = False
    return trainer, prompt + 2 * text, prompt + text


def _collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
