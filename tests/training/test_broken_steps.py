"""A step whose gradients are not finite leaves the weights and the optimizer unchanged."""

from __future__ import annotations

import copy

import pytest
import torch
from models import tiny_model
from test_evaluation import BACKEND, on_processes
from test_trainer import lora, trainer_of
from transformers import TrainerCallback


@pytest.fixture(autouse=True)
def _cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")


class Recorder(TrainerCallback):
    """The weights and the optimizer state after each step."""

    def __init__(self, trainer):
        self.trainer, self.states = trainer, []

    def on_step_end(self, args, state, control, **kwargs):
        weights = {name: weight.clone() for name, weight in self.trainer.model.state_dict().items()}
        self.states.append((weights, copy.deepcopy(self.trainer.optimizer.state_dict()["state"])))


def broken_at(trainer, batches, value=float("nan")):
    """Puts `value` into a gradient after some of the micro-batches, counted from 1."""
    step, count = trainer.training_step, [0]

    def training_step(*args, **kwargs):
        loss = step(*args, **kwargs)
        count[0] += 1
        if count[0] in batches:
            weight = next(weight for weight in trainer.model.parameters() if weight.grad is not None)
            weight.grad.view(-1)[0] = value
        return loss

    trainer.training_step = training_step


def same(one, other) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("settings", "batch"),
    [
        ({}, 2),
        ({"gradient_accumulation_steps": 2}, 3),
        ({"max_grad_norm": None}, 2),
        ({"max_grad_norm": 0.0}, 2),
        ({"peft_config": lora()}, 2),
        ({"peft_config": lora(), "adapter_scope": "draft"}, 2),
        ({"bf16": True, "weight_decay": 0.1}, 2),
    ],
)
def test_a_step_of_broken_gradients_changes_nothing_and_is_counted(tmp_path, settings, batch, value):
    trainer = trainer_of(
        tiny_model(), tmp_path, max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, **settings
    )
    broken_at(trainer, {batch}, value)
    recorder = Recorder(trainer)
    trainer.add_callback(recorder)
    trainer.train()
    assert same(recorder.states[0], recorder.states[1]), "the second step was skipped"
    assert not same(recorder.states[1], recorder.states[2]), "the training goes on"
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())
    logged = [line["skipped_steps"] for line in trainer.state.log_history if "loss" in line]
    assert logged == [0, 1, 1, 1]


def test_ten_in_a_row_end_the_training_and_leave_the_weights(tmp_path):
    trainer = trainer_of(tiny_model(), tmp_path, max_steps=30, per_device_train_batch_size=2, learning_rate=1e-2)
    broken_at(trainer, {*range(2, 11), *range(13, 40)})
    recorder = Recorder(trainer)
    trainer.add_callback(recorder)
    with pytest.raises(ValueError, match="the gradients of 10 steps in a row are NaN or infinite"):
        trainer.train()
    assert trainer.broken_steps.skipped == 19 and trainer.state.global_step == 21
    assert same(recorder.states[11][0], trainer.model.state_dict())


def skipping(folder) -> list:
    """Sums of each process's weights after each step; the second step is broken on the last process."""
    from accelerate.utils import gather_object

    trainer = trainer_of(
        tiny_model(), folder, max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, **BACKEND
    )
    if trainer.accelerator.is_last_process:
        broken_at(trainer, {2})
    recorder = Recorder(trainer)
    trainer.add_callback(recorder)
    trainer.train()
    sums = [float(sum(weight.double().sum() for weight in weights.values())) for weights, _ in recorder.states]
    return gather_object([sums])


@pytest.mark.multiprocess
def test_all_processes_skip_a_step_that_is_broken_on_one(tmp_path):
    """With weights spread over the processes, only one may see it."""
    one, other = on_processes(2, "skipping", tmp_path, module="test_broken_steps")
    assert one == other
    assert one[0] == one[1] != one[2]


def test_what_a_gradient_scaler_does_is_left_to_it(tmp_path):
    """It checks for broken gradients itself, and cannot take a step without gradients."""
    trainer = trainer_of(tiny_model(), tmp_path)
    weight = next(trainer.model.parameters())
    weight.grad = torch.full_like(weight, float("nan"))
    trainer.accelerator.scaler = object()
    trainer.broken_steps.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control)
    assert weight.grad is not None and trainer.broken_steps.skipped == 0
    trainer.accelerator.scaler = None
    trainer.broken_steps.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control)
    assert weight.grad is None and trainer.broken_steps.skipped == 1
