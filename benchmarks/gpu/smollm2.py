"""SmolLM2-135M-Instruct: a table of n-grams, a draft-only adapter, then the whole model if time allows."""

from __future__ import annotations

import copy
import os
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import load_from_disk
from peft import LoraConfig, get_peft_model
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

import hf_jacobi
from benchmarks.smollm2.prompts import prompts
from hf_jacobi import (
    JacobiForcingConfig,
    JacobiForcingTrainer,
    build_ngram_table,
    collect_trajectories,
    pack_trajectories,
)
from hf_jacobi.cli.models import MINIATURE, load
from hf_jacobi.evaluation.measuring import AR, Method, compare, race

from .stage import Stage


BLOCK = 16
WAYS = {
    "AR": AR,
    "Jacobi 16": Method("Jacobi 16", "jacobi", {"block_size": BLOCK, "pool_size": 0}),
    "Jacobi 16, recycling": Method("Jacobi 16, recycling", "jacobi", {"block_size": BLOCK, "pool_size": 4}),
    "Jacobi, default": Method("Jacobi, default", "jacobi", {}),
}
KEPT = (
    "tokens_per_forward",
    "tokens_per_second",
    "speedup",
    "slowest",
    "identical",
    "positions_per_token",
)
PART = 15 << 20  # maximum bytes of a returned file
SHORT = 1024  # up to this many tokens per row, one call with a dense mask is faster than many small ones


@dataclass(frozen=True)
class Sizes:
    """The sizes of all parts; `TOY` is for a dry run."""

    held_out: int = 24
    timed: int = 2
    train: int = 1920
    new_tokens: int = 64
    batch: int = 64
    rows: int = 16  # of a training step
    rank: int = 24  # the largest whose file in half precision stays below 16 MB
    copies: int = 4  # of the noise of each text, for the adapter, which reads the text once
    kept_rank: int = 32  # of the whole model's difference


TOY = Sizes(held_out=2, timed=1, train=4, new_tokens=16, batch=4, rows=2, rank=4, kept_rank=4)


def run(stage: Stage) -> None:
    """Trajectories, table, adapter, whole model, the last three decoded; the others get a share of the time left."""
    start = time.monotonic()
    try:
        session = Session(stage, TOY if stage.dry else Sizes())
    except Exception as error:
        stage.content["errors"]["model"] = f"{type(error).__name__}: {error}"
        stage.write()
        return
    stage.measure("model", lambda: {"name": session.name, "seconds": time.monotonic() - start})
    stage.measure("before", session.decode, session.base)
    seconds = 3.0 if stage.dry else 0.25 * stage.left
    if stage.measure("trajectories", session.collect, seconds) is None:
        return
    if stage.measure("n-grams/table", session.build_table) is not None:
        stage.measure("n-grams", session.decode, session.base)
    seconds = 3.0 if stage.dry else 0.3 * stage.left
    stage.measure("draft-only/training", session.learn_to_draft, seconds)
    if session.trained is not None:
        stage.measure("draft-only", session.decode, session.trained)
        stage.measure("draft-only/files", session.bring_home, session.trained, "smollm2-draft-only")
    seconds = 3.0 if stage.dry else stage.left - 45
    if seconds < 3:
        stage.content["skipped"]["whole model"] = f"{stage.left:.0f} s were left"
        return stage.write()
    stage.measure("whole model/training", session.learn_whole, seconds)
    if session.trained is not None:
        stage.measure("whole model", session.decode, session.trained)
        stage.measure("whole model/difference", session.bring_difference_home)


class Session:
    """
    The model, its prompts, and what it learned.

    Attributes:
        base: the untrained model, float32.
        trained: the result of the newest training, `None` if it failed.
        ways: of decoding; with a table of n-grams, too, once there is one.
    """

    def __init__(self, stage: Stage, sizes: Sizes):
        self.stage, self.sizes, self.trained, self.ways = stage, sizes, None, dict(WAYS)
        cache = stage.bundle / "cache"
        brought = cache.exists()
        if not brought and not stage.dry:
            raise FileNotFoundError("no bundle contained SmolLM2: pass all folders of one with --bundle")
        os.environ["HF_JACOBI_CACHE"] = str(cache)
        self.name = "SmolLM2-135M-Instruct" if brought else "miniature, in its place"
        self.base, self.tokenizer = load(None if brought else str(MINIATURE), "float32")
        self.tokenizer.padding_side = "left"
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        hf_jacobi.enable(self.base)
        self.held_out = self.questions(True)[: sizes.held_out]

    def questions(self, held_out: bool) -> list[str]:
        """The prompts of `benchmarks.smollm2`."""
        return [row["messages"][0]["content"] for row in prompts(held_out)]

    def encode(self, questions: list[str]) -> dict[str, torch.Tensor]:
        """`[rows, length]`, padded on the left."""
        texts = questions
        if self.tokenizer.chat_template:
            texts = [
                self.tokenizer.apply_chat_template(
                    [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
                )
                for question in questions
            ]
        encoded = self.tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
        return {name: encoded[name].to(self.base.device) for name in ("input_ids", "attention_mask")}

    def decode(self, model) -> dict:
        """
        Decodes held-out prompts greedily, in the dtype that is fastest on the device.

        Returns:
            for each way `tokens_per_forward` and `identical` (the share of texts equal to the base model's AR text,
            except for ties in half precision), over all prompts in batches; `tokens_per_second` and `speedup` over
            AR of the base model, at batch 1.
        """
        base = self._quick(self.base)
        model = base if model is self.base else self._quick(model)
        half = len(self.held_out) // 2
        batches = [self.encode(self.held_out[:half]), self.encode(self.held_out[half:])]
        singles = [self.encode([question]) for question in self.held_out[: self.sizes.timed]]
        contestants = {name: (base if way is AR else model, way) for name, way in self.ways.items()}
        if model is not base:
            contestants["AR, trained"] = (model, AR)
        figures = {}
        for name, inputs, warm_up in (("all", batches, 0), ("batch 1", singles, 1)):
            found = compare(list(race(contestants, inputs, self.sizes.new_tokens, warm_up)))
            figures[name] = {way: {key: row[key] for key in KEPT} for way, row in found.items()}
        return figures

    def _quick(self, model):
        """The model in the form that decodes fastest: on a GPU, a copy in bfloat16."""
        if not self.stage.on_gpu:
            return model.eval()
        return hf_jacobi.enable(copy.deepcopy(model).to(torch.bfloat16).eval())

    def collect(self, seconds: float) -> dict:
        """As many trajectories of the training prompts as time allows, or those of a bundle."""
        start = time.monotonic()
        if (brought := self.stage.bundle / "trajectories").exists():
            self.trajectories = load_from_disk(str(brought))
            return {"texts": len(self.trajectories), "brought_along": True}
        model, questions, rows = self._quick(self.base), self.questions(False)[: self.sizes.train], []
        for first in range(0, len(questions), self.sizes.batch):
            some = questions[first : first + self.sizes.batch]
            rows += collect_trajectories(
                model,
                self.tokenizer,
                some,
                block_size=BLOCK,
                as_chat=bool(self.tokenizer.chat_template),
                max_new_tokens=self.sizes.new_tokens,
                batch_size=self.sizes.batch,
                positions_per_forward=2048 if self.stage.dry else 16384,
                repetition="keep",
                progress=False,
            )
            if time.monotonic() - start > seconds:
                break
        self.trajectories = rows
        return {"texts": len(rows), "tokens": sum(len(row["completion_ids"]) for row in rows)}

    def build_table(self) -> dict:
        """A table of n-grams of the collected texts."""
        file = build_ngram_table(self.trajectories, self.stage.output)
        for name in ("Jacobi 16, recycling", "Jacobi, default"):
            settings = WAYS[name].settings | {"ngram_table": str(file)}
            self.ways[f"{name}, table"] = Method(f"{name}, table", "jacobi", settings)
        return {"bytes": file.stat().st_size}

    def learn_to_draft(self, seconds: float) -> dict:
        """An adapter that only drafts, on rows without clean context before their noise (windows of one block)."""
        self.trained = None
        adapter = LoraConfig(r=self.sizes.rank, lora_alpha=2 * self.sizes.rank, target_modules="all-linear")
        settings = {"adapter_scope": "draft", "adam_beta2": 0.98}
        return self._learn(seconds, 1, "random", 1e-3, adapter, copies=self.sizes.copies, **settings)

    def learn_whole(self, seconds: float) -> dict:
        """All weights by the paper's recipe: n = 16, windows of 16 blocks, linear noise."""
        self.trained = None
        return self._learn(seconds, 16, "linear", 2e-5, None)

    def _learn(self, seconds: float, window: int, noise: str, rate: float, adapter, copies=1, **settings) -> dict:
        packed = pack_trajectories(self.trajectories, window, noise, noisy_copies=copies, progress=False)
        longest = max(len(row["input_ids"]) for row in packed)
        with tempfile.TemporaryDirectory() as folder:
            arguments = JacobiForcingConfig(
                output_dir=folder,
                per_device_train_batch_size=self.sizes.rows,
                learning_rate=rate,
                max_steps=1_000_000,  # until the time is up
                bf16=self.stage.on_gpu,
                use_cpu=not self.stage.on_gpu,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                logging_steps=20,
                **settings,
            )
            trainer = TimedTrainer(seconds, copy.deepcopy(self.base), arguments, packed, peft_config=adapter)
            trainer.windowed = trainer.windowed and longest > SHORT
            trainer.train()
        self.trained = hf_jacobi.enable(trainer.model)
        entries = [entry for entry in trainer.state.log_history if "noisy_accuracy" in entry]
        return {"rows": len(packed), "steps": trainer.state.global_step, "seconds": seconds} | {
            name: [entry[name] for entry in (entries[:1] + entries[-1:])]
            for name in ("loss", "noisy_accuracy", "tokens_per_second")
        }

    def bring_home(self, model, name: str) -> list[str]:
        """Stores an adapter in half precision, in files that are small enough; returns their names."""
        with tempfile.TemporaryDirectory() as folder:
            copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
            whole = Path(folder) / "whole.tar"
            with tarfile.open(whole, "w") as archive:
                for file in sorted(Path(folder).iterdir()):
                    if file != whole:
                        archive.add(file, f"{name}/{file.name}")
            return split(whole, self.stage.output, f"{name}.tar", PART)

    def bring_difference_home(self) -> dict:
        """
        What the whole model learned, as an adapter for all tokens: the low-rank difference of each layer's matrices,
        without embeddings and norms. It is also decoded.
        """
        rank = self.sizes.kept_rank
        plain = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = get_peft_model(copy.deepcopy(self.base), plain)
        trained = dict(self.trained.named_modules())
        lost = total = 0.0
        for name, layer in adapted.get_base_model().named_modules():
            if not hasattr(layer, "lora_A"):
                continue
            difference = (trained[name].weight - layer.base_layer.weight).detach().float()
            left, values, right = torch.svd_lowrank(difference, q=rank)
            layer.lora_B["default"].weight.data.copy_(left * values)
            layer.lora_A["default"].weight.data.copy_(right.T)
            total += difference.square().sum().item()
            lost += (difference - (left * values) @ right.T).square().sum().item()
        merged = copy.deepcopy(adapted).merge_and_unload()
        figure = {"rank": rank, "lost": (lost / max(total, 1e-30)) ** 0.5}
        figure["files"] = self.bring_home(adapted, "smollm2-whole-difference")
        return figure | {"decoded": self.decode(hf_jacobi.enable(merged))["all"]}


class TimedTrainer(JacobiForcingTrainer):
    """Trains for a number of seconds; the learning rate warms up, then falls to zero at the end."""

    WARM_UP = 20  # steps

    def __init__(self, seconds: float, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.seconds, self.started = seconds, time.monotonic()
        self.add_callback(_Until(self))

    @property
    def done(self) -> float:
        """The share of the time that has passed."""
        return (time.monotonic() - self.started) / self.seconds

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """Overrides `Trainer`'s schedule, which counts steps."""
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, self._rate)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _rate(self, step: int) -> float:
        return min(1.0, (step + 1) / self.WARM_UP) * max(0.0, 1.0 - self.done)


class _Until(TrainerCallback):
    def __init__(self, trainer: TimedTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = self.trainer.done >= 1.0
        control.should_log = control.should_log or control.should_training_stop


def split(file: Path, folder: Path, name: str, size: int) -> list[str]:
    """Copies a file into parts of at most `size` bytes, `name.0`, `name.1` and so on; `cat name.*` joins them."""
    parts = []
    with file.open("rb") as whole:
        while part := whole.read(size):
            parts.append(f"{name}.{len(parts)}")
            (folder / parts[-1]).write_bytes(part)
    return parts
