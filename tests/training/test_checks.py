"""Unsupported arguments, models and launches are refused at construction, in one sentence."""

from __future__ import annotations

import inspect

import pytest
import torch
from accelerate import ParallelismConfig
from models import tiny_model
from packed_rows import trajectories
from test_trainer import arguments, lora, rows, trainer_of
from transformers import Trainer

import hf_jacobi
from hf_jacobi import JacobiForcingTrainer, UsageError
from hf_jacobi.training.collator import PackedCollator


NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def _cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")


@pytest.mark.parametrize("size", ["cp_size", "sp_size"])
def test_context_and_sequence_parallelism_are_refused(tmp_path, monkeypatch, size):
    """accelerate would silently replace our mask with a causal one. `accelerate launch` sets variables."""
    with pytest.raises(UsageError, match=rf"\({size}=2\) would put a causal mask"):
        trainer_of(tiny_model(), tmp_path, parallelism_config=ParallelismConfig(**{size: 2}))
    with pytest.raises(UsageError, match=rf"\({size}=2\) would put a causal mask"):
        trainer_of(tiny_model(), tmp_path, parallelism_config={size: 2})
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{size.upper()}", "2")
    with pytest.raises(UsageError, match=rf"\({size}=2\) would put a causal mask"):
        trainer_of(tiny_model(), tmp_path)


def test_processes_that_would_wait_for_each_other_are_refused(tmp_path, monkeypatch):
    uneven = arguments(tmp_path, accelerator_config={"even_batches": False})
    JacobiForcingTrainer(tiny_model(), uneven, train_dataset=rows(2))
    monkeypatch.setattr(type(uneven), "world_size", 2)
    with pytest.raises(UsageError, match="`even_batches=False` gives some of 2 processes fewer batches"):
        JacobiForcingTrainer(tiny_model(), uneven, train_dataset=rows(2))
    with pytest.raises(UsageError, match="`dispatch_batches=True` joins the batches of all processes"):
        trainer_of(tiny_model(), tmp_path, accelerator_config={"dispatch_batches": True})


def test_sequence_parallelism_of_deepspeed_is_refused():
    from hf_jacobi.training.checks import refuse_split_rows

    class Arguments:
        class hf_deepspeed_config:
            config = {"sequence_parallel_size": 4}  # noqa: RUF012

    with pytest.raises(UsageError, match=r"\(sequence_parallel_size=4\)"):
        refuse_split_rows(Arguments)
    Arguments.hf_deepspeed_config.config = {"sequence_parallel_size": 1}
    refuse_split_rows(Arguments)


@pytest.mark.parametrize(
    "settings",
    [
        {"ar_loss_weight": NAN},
        {"ar_loss_weight": INF},
        {"ar_loss_weight_start": NAN},
        {"temperature": NAN},
        {"temperature": INF},
        {"learning_rate": NAN},
        {"weight_decay": INF},
        {"label_smoothing_factor": NAN},
        {"max_grad_norm": NAN},
        {"adam_epsilon": NAN},
    ],
)
def test_numbers_that_are_none_are_refused(tmp_path, settings):
    (name,) = settings
    with pytest.raises(UsageError, match=rf"`{name}` must be a finite number, got (nan|inf)"):
        arguments(tmp_path, **settings)


@pytest.mark.parametrize("name", ["loss_chunk_size", "eval_prompts", "eval_max_new_tokens", "block_size"])
def test_counts_are_whole(tmp_path, name):
    with pytest.raises(UsageError, match=rf"`{name}` must be a whole number of at least \d, got 2\.5"):
        arguments(tmp_path, **{name: 2.5})


@pytest.mark.parametrize("value", [NAN, -INF])
def test_a_model_with_a_broken_weight_is_named_as_such(tmp_path, value):
    model = tiny_model()
    model.model.embed_tokens.weight.data[90, 3] = value  # the weight of a token that no check of logits uses
    with pytest.raises(UsageError, match=r"the model is broken: model\.embed_tokens\.weight"):
        trainer_of(model, tmp_path)


def test_logits_that_come_to_nan_or_infinity_are_named_as_such(tmp_path):
    def large(model):
        model.lm_head.weight.data *= 1e38

    def overflowing(model):
        model.model.norm.weight.data *= 1e30
        model.lm_head.weight.data *= 1e30

    for spoil in (large, overflowing):
        model = tiny_model()
        spoil(model)
        with pytest.raises(UsageError, match=r"the logits of LlamaForCausalLM in torch\.float32 are NaN or infinite"):
            trainer_of(model, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"model_init_kwargs": "not json"},
            "`model_init_kwargs` must be a dictionary, or JSON of one",
        ),
        ({"model_init_kwargs": "{bad"}, "an argument must be JSON, got '{bad'"),
        ({"jacobi_config": "not json"}, "`jacobi_config` must be a dictionary, or JSON of one, got 'not json'"),
        ({"fp16": True}, "`fp16` needs a GPU"),
        ({"learning_rate": -1}, "`learning_rate` must be at least 0, got -1"),
        ({"learning_rate": "abc"}, "`learning_rate` must be a finite number, got 'abc'"),
        ({"label_smoothing_factor": 2.0}, "`label_smoothing_factor` must be from 0 to 1"),
        ({"adam_beta1": 1.0}, r"`adam_beta1` must be from 0 to 0\.9"),
        ({"per_device_eval_batch_size": 0}, "`per_device_eval_batch_size` must be at least 1"),
        ({"gradient_accumulation_steps": 0}, "`gradient_accumulation_steps` must be at least 1"),
        ({"eval_strategy": "nope"}, "nope is not a valid IntervalStrategy"),
    ],
)
def test_other_arguments_are_refused_in_a_sentence(tmp_path, settings, message):
    with pytest.raises(UsageError, match=message):
        trainer_of(tiny_model(), tmp_path, **settings)


def test_a_search_for_hyperparameters_is_refused(tmp_path):
    with pytest.raises(UsageError, match="`model_init`, and with it the search for hyperparameters, is not supported"):
        JacobiForcingTrainer(None, arguments(tmp_path), train_dataset=rows(2), model_init=tiny_model)


def test_parameters_are_those_of_trainer_in_its_order():
    ours, theirs = (list(inspect.signature(one.__init__).parameters) for one in (JacobiForcingTrainer, Trainer))
    assert ours[: len(theirs)] == theirs and ours[len(theirs) :] == ["peft_config", "eval_score", "refresh"]


@pytest.mark.parametrize("name", ["compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"])
def test_functions_that_would_never_be_called_are_refused(tmp_path, name):
    with pytest.raises(UsageError, match=rf"`{name}` .*omit it"):
        JacobiForcingTrainer(tiny_model(), arguments(tmp_path), train_dataset=rows(2), **{name: print})


def test_an_optimizer_made_before_the_weights_it_should_train_is_refused(tmp_path):
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with pytest.raises(UsageError, match="`optimizers` cannot hold the weights"):
        trainer_of(model, tmp_path, optimizers=(optimizer, None), peft_config=lora())
    trainer = trainer_of(model, tmp_path, optimizers=(optimizer, None))
    trainer.train()
    assert trainer.optimizer.optimizer is optimizer
    settings = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 1e-3}), "peft_config": lora()}
    trainer = trainer_of(tiny_model(), tmp_path, **settings)
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, torch.optim.SGD)


def test_the_training_set_can_be_the_third_argument(tmp_path):
    """As it was before the parameters followed `Trainer`'s order."""
    data = rows(2)
    trainer = JacobiForcingTrainer(tiny_model(), arguments(tmp_path), data)
    assert trainer.train_dataset is data and isinstance(trainer.data_collator, PackedCollator)
    with pytest.raises(UsageError, match=r"`data_collator` must be a function .* by name"):
        JacobiForcingTrainer(tiny_model(), arguments(tmp_path), data, rows(2))


def test_texts_without_a_prompt_are_trained_on_and_passed_over_in_decoding(tmp_path):
    bare = [row | {"prompt_ids": []} for row in trajectories(3)]
    settings = {"eval_prompts": 2, "eval_max_new_tokens": 8}
    data = hf_jacobi.pack_trajectories(bare, window_size=2)
    trainer = trainer_of(tiny_model(), tmp_path, data=data, eval_dataset=data, **settings)
    trainer.train()
    assert "eval_tokens_per_forward" not in trainer.evaluate()
    mixed = hf_jacobi.pack_trajectories(bare + trajectories(3), window_size=2)
    trainer = trainer_of(tiny_model(), tmp_path, data=data, eval_dataset=mixed, **settings)
    assert len(trainer.decoding.prompts) == 2 and trainer.evaluate()["eval_agreement"] == 1.0


def test_infinite_clipping_measures_the_norm_alone(tmp_path):
    for norm in (INF, None):
        trainer = trainer_of(tiny_model(), tmp_path, max_grad_norm=norm)
        trainer.train()
        assert torch.isfinite(torch.tensor(trainer.state.log_history[0]["grad_norm"]))
