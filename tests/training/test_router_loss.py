"""The router loss of a mixture of experts is added if its configuration says so."""

from __future__ import annotations

import math

import pytest
import torch
from models import tiny_model
from packed_rows import packed
from test_trainer import assert_same, rows, trainer_of

from hf_jacobi.trajectories import collect_trajectories
from hf_jacobi.trajectories.packing import COLUMNS


EXPERTS, PER_TOKEN = 4, 2
ASKED = {"output_router_logits": True, "router_aux_loss_coef": 10.0}


@pytest.fixture(autouse=True)
def _cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")


def text_alone(row: dict) -> dict:
    length = row["block_ids"].count(-1)
    return {column: row[column][:length] for column in COLUMNS}


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "gpt_oss"])
def test_the_loss_of_a_text_is_that_of_the_model_itself(name, tmp_path):
    model = tiny_model(name, attention="eager", **ASKED)
    row = text_alone(packed(1)[0])
    own = model(torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]]))
    assert own.aux_loss > 0.1
    trainer = trainer_of(model, tmp_path)
    loss, terms = trainer.compute_loss(model, trainer.data_collator([row]), return_outputs=True)
    assert float(terms.router) == pytest.approx(float(own.aux_loss) * len(row["input_ids"]), rel=1e-5)
    assert float(loss) == pytest.approx(float(own.loss), rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_padding_does_not_count_and_noise_does(tmp_path, training):
    """Compared with the formula of the Switch Transformer (arXiv 2101.03961, equations 4 to 6), token by token."""
    model = tiny_model("qwen3_moe", **ASKED)
    trainer = trainer_of(model, tmp_path)
    model.train(training)
    batch = trainer.data_collator(packed(3))
    seen: list[torch.Tensor] = []
    handles = [
        module.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0] @ module.weight.T))
        for name, module in model.named_modules()
        if name.endswith("mlp.gate")
    ]
    with torch.no_grad():
        _, terms = trainer.compute_loss(model, batch, return_outputs=True)
    for handle in handles:
        handle.remove()
    present = batch["seq_ids"] >= 0
    assert not present.all()
    total = 0.0
    for mask in [present] if training else [present & (torch.arange(3) == row)[:, None] for row in range(3)]:
        chosen, likely, count = [0] * EXPERTS, [0.0] * EXPERTS, 0
        for layer in seen:
            for scores in layer.reshape(-1, EXPERTS)[mask.flatten()]:
                count += 1
                for expert in scores.topk(PER_TOKEN).indices.tolist():
                    chosen[expert] += 1
                for expert, share in enumerate(scores.softmax(-1).tolist()):
                    likely[expert] += share
        loss = EXPERTS * sum(a / count * b / count for a, b in zip(chosen, likely))
        total += loss * int(mask.sum())
    assert float(terms.router) == pytest.approx(total, rel=1e-4)


def gradients(folder, data, **settings) -> dict[str, torch.Tensor]:
    model = tiny_model("mixtral", **ASKED)
    trainer = trainer_of(model, folder, data=data, learning_rate=0.0, max_grad_norm=0.0, **settings)
    found = {}
    trainer.create_optimizer()
    step = trainer.optimizer.step

    def spy(*args, **kwargs):
        found.update({name: weight.grad.clone() for name, weight in model.named_parameters()})
        return step(*args, **kwargs)

    trainer.optimizer.step = spy
    trainer.train()
    logged = trainer.state.log_history[0]
    expected = logged["consistency_loss"] + logged["ar_loss"] + 10.0 * logged["router_loss"]
    assert logged["loss"] == pytest.approx(expected, rel=1e-4) and not math.isclose(logged["router_loss"], 0)
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        {"activation_checkpointing": True},
    ],
)
def test_it_weighs_as_much_however_a_step_is_cut(tmp_path, settings):
    """With identical rows, because the loss of a mixed batch is not the mean over its parts."""
    data = rows(1).select([0] * 8)
    assert_same(gradients(tmp_path, data, **settings), gradients(tmp_path, data))


def test_it_changes_what_is_learned_and_is_logged(tmp_path):
    losses = {}
    for coefficient in (0.0, 10.0):
        model = tiny_model("mixtral", **ASKED | {"router_aux_loss_coef": coefficient})
        trainer = trainer_of(
            model, tmp_path, max_steps=2, learning_rate=1e-2, eval_dataset=rows(3), eval_prompts=1,
            eval_max_new_tokens=8,
        )  # fmt: skip
        trainer.train()
        losses[coefficient] = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        metrics = trainer.evaluate()
        assert ("eval_router_loss" in metrics) == bool(coefficient)
        expected = metrics["eval_consistency_loss"] + metrics["eval_ar_loss"]
        expected += coefficient * metrics.get("eval_router_loss", 0.0)
        assert metrics["eval_loss"] == pytest.approx(expected)
        assert model.config.output_router_logits, "decoding in between did without it, and left it on"
    assert losses[10.0][0] > losses[0.0][0] + 5


def test_nothing_is_added_where_it_is_not_asked_for(tmp_path):
    model = tiny_model("mixtral", router_aux_loss_coef=10.0)
    trainer = trainer_of(model, tmp_path)
    loss, terms = trainer.compute_loss(model, trainer.data_collator(packed(2)), return_outputs=True)
    assert terms.router == 0.0 and float(loss) < 20


def test_one_that_is_not_known_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func", lambda *_: 0.0)
    with pytest.raises(ValueError, match="output_router_logits = False"):
        trainer_of(tiny_model("mixtral", **ASKED), tmp_path)


def test_trajectories_of_a_model_that_asks_for_it_are_collected(tmp_path):
    from models import tiny_tokenizer

    plain, asking = (
        collect_trajectories(tiny_model("mixtral", **settings), tiny_tokenizer(), ["w3 w4"], 4, 12, progress=False)[:]
        for settings in ({}, ASKED)
    )
    assert plain == asking
