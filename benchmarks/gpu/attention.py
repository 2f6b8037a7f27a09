"""Attention in training: FlexAttention and attention by windows compared with the dense mask, in results and time."""

from __future__ import annotations

import time
from contextlib import nullcontext

import torch

from benchmarks.training import made_up_trajectories
from hf_jacobi.training.collator import PackedCollator
from hf_jacobi.training.mask import FLEX_MULTIPLE, RowTensors, dense_mask, flex_mask
from hf_jacobi.training.windows import attending_by_windows, segments
from hf_jacobi.trajectories.packing import PackSettings, packed_rows

from .chain import QWEN_1_5B, TOY, shaped_model
from .stage import Stage
from .timing import median_seconds, peak_memory, synchronize


LAYERS = 4  # with the shape of a 1.5B model: all layers do the same work
WAYS = ("dense", "windows", "flex")


def run(stage: Stage) -> None:
    """All figures; FlexAttention has no backward pass on a CPU, so only its forward pass is compared there."""
    if stage.dry:  # on a CPU, FlexAttention would compile with C++: run it uncompiled instead
        torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
    shape = TOY if stage.dry else QWEN_1_5B | {"num_hidden_layers": LAYERS, "vocab_size": 4096}
    lengths = (256,) if stage.dry else (2048, 4096, 8192)
    dtypes = {"float32": torch.float32} | ({} if stage.dry else {"bfloat16": torch.bfloat16})
    for name, dtype in dtypes.items():
        case = Case(shape, stage.device, dtype, lengths[0])
        for way in ("flex", "windows"):
            backward = way == "windows" or stage.on_gpu
            stage.measure(f"{way}/{name}/{lengths[0]}", case.compare, way, backward)
        del case
    for length in lengths:
        case = Case(shape, stage.device, dtype, length)
        for way in WAYS:
            backward = way != "flex" or stage.on_gpu
            stage.measure(f"{way}/{length}", case.time, way, backward, needs=10)
        del case


class Case:
    """
    A model and one packed row of text and noise, with windows of 16 blocks of 16.

    Args:
        shape, device, dtype: of the model.
        length: tokens of the row, a multiple of `FLEX_MULTIPLE`.
    """

    def __init__(self, shape: dict, device: torch.device, dtype: torch.dtype, length: int):
        self.model = shaped_model(shape, device, dtype)
        text = (length - 64) // 2 // 16 * 16
        rows = made_up_trajectories(1, text, vocabulary=shape["vocab_size"])
        settings = PackSettings(16, "linear", 0.0, 1.0, None, False, 0)
        batch = PackedCollator(0, FLEX_MULTIPLE)(list(packed_rows(rows, settings)))
        self.batch = {name: tensor.to(device) for name, tensor in batch.items()}
        self.rows = RowTensors.of(self.batch)
        self.real = self.rows.seq_ids >= 0  # what padding attends to differs between ways

    def forward(self, way: str) -> torch.Tensor:
        """Hidden states of the row's tokens, `[N, H]`, by a kind of attention."""
        model = self.model
        model.set_attn_implementation("flex_attention" if way == "flex" else "sdpa")
        masks = {"dense": lambda: dense_mask(self.rows, model.config, model.dtype), "windows": self._segments}
        mask = masks.get(way, lambda: flex_mask(self.rows, model.config))()
        with attending_by_windows(model) if way == "windows" else nullcontext():
            hidden = model.model(
                self.batch["input_ids"],
                attention_mask=mask,
                position_ids=self.batch["position_ids"],
                use_cache=False,
            ).last_hidden_state
        return hidden[self.real]

    def _segments(self) -> torch.Tensor:
        return segments(self.rows)

    def step(self, way: str, backward: bool) -> torch.Tensor:
        """A forward pass, with or without a backward pass."""
        with nullcontext() if backward else torch.no_grad():
            hidden = self.forward(way)
        if backward:
            self.model.zero_grad()
            with attending_by_windows(self.model) if way == "windows" else nullcontext():
                hidden.float().square().mean().backward()
        return hidden.detach()

    def gradient(self) -> torch.Tensor:
        """All gradients, concatenated."""
        return torch.cat([part.grad.flatten() for part in self.model.parameters() if part.grad is not None])

    def compare(self, way: str, backward: bool) -> dict:
        """
        The relative difference from the dense mask, ||ours - dense|| / ||dense||: `logits` and, with a backward pass,
        `gradients`.
        """
        head = self.model.lm_head
        dense = head(self.step("dense", backward)).detach()
        gradient = self.gradient().clone() if backward else None
        ours = head(self.step(way, backward)).detach()
        figure = {"logits": _difference(ours, dense)}
        if backward:
            figure["gradients"] = _difference(self.gradient(), gradient)
        return figure

    def time(self, way: str, backward: bool, rounds: int = 5) -> dict:
        """
        Returns:
            `first_ms` (with compilation), `forward_ms`, `both_ms` (forward and backward), `peak_gib`.
        """
        figure: dict = {}
        start = time.perf_counter()
        self.step(way, backward)
        synchronize()
        figure["first_ms"] = 1000 * (time.perf_counter() - start)
        figure["forward_ms"] = 1000 * median_seconds(lambda: self.step(way, False), rounds)
        if backward:
            with peak_memory(figure):
                figure["both_ms"] = 1000 * median_seconds(lambda: self.step(way, True), rounds)
        return figure


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()
