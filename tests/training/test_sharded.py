"""FSDP 2 on two CPU processes: the losses of one process, checkpoints, and weights gathered once per step."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from models import tiny_model
from packed_rows import packed
from sharded import shard, with_zero
from test_evaluation import BACKEND, on_processes
from test_trainer import curve, lora, rows, trainer_of
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

import hf_jacobi
from hf_jacobi.training.checks import refuse_without_sharding


STEPS = 20
KINDS = {  # of the model, and of the trainer
    "untied": ({}, {"accept_cut": True}),
    "tied": ({"tie_word_embeddings": True}, {"consistency_loss": "lk"}),
    "lora": ({}, {"peft_config": lora()}),
    "draft": ({}, {"peft_config": lora(), "adapter_scope": "draft"}),
}


@pytest.fixture(autouse=True)
def _cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")


def sharded_trainer(folder, kind: str, processes: int = 1, **settings):
    of_model, of_trainer = KINDS[kind]
    model = settings.pop("model", None) or tiny_model(**of_model)
    torch.manual_seed(0)  # of the adapter
    settings = {"max_steps": STEPS, "learning_rate": 3e-3, "loss_chunk_size": 16} | of_trainer | settings
    return trainer_of(
        model, folder, per_device_train_batch_size=4 // processes, eval_dataset=rows(3, seed=1), **BACKEND | settings
    )  # fmt: skip


def curves(folder) -> dict[str, list[float]]:
    """The losses of all kinds; for one kind also those of a run resumed midway, after an evaluation."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1:
        shard()
    found = {}
    for kind in KINDS:
        trainer = sharded_trainer(
            f"{folder}-{kind}", kind, processes, save_strategy="steps", save_steps=STEPS // 2, eval_prompts=2
        )
        assert trainer.is_fsdp_enabled == (processes > 1)
        trainer.train()
        assert processes == 1 or any("FSDP" in type(module).__name__ for module in trainer.model.modules())
        found[kind] = curve(trainer)
        trainer.save_model(f"{folder}-{kind}/saved")
        found[f"{kind}, evaluated"] = [trainer.evaluate()["eval_loss"]]
    resumed = sharded_trainer(f"{folder}-untied", "untied", processes, eval_prompts=0)
    if processes > 1:
        with pytest.raises(ValueError, match=r"FSDP 2 shards a model when its training begins: .* eval_on_start=True"):
            resumed.evaluate()
    resumed.train(resume_from_checkpoint=f"{folder}-untied/checkpoint-{STEPS // 2}")
    found["resumed"] = curve(resumed)
    return found


@pytest.mark.multiprocess
def test_sharded_processes_train_save_and_resume_as_one_does(tmp_path):
    one, two = curves(tmp_path / "curves-1"), on_processes(2, "curves", tmp_path, module="test_sharded")
    assert one.keys() == two.keys()
    for kind, losses in one.items():
        assert len(losses) in (1, STEPS) and two[kind] == pytest.approx(losses, rel=1e-4), kind
    assert two["resumed"] == pytest.approx(two["untied"], rel=1e-4)
    prompt = torch.tensor([[5, 6, 7, 8]])
    for kind in ("untied", "tied", "lora", "draft"):
        texts = []
        for processes in (1, 2):
            folder = tmp_path / f"curves-{processes}-{kind}" / "saved"
            model = saved(folder, kind)
            output = hf_jacobi.enable(model).generate(
                prompt, max_new_tokens=24, decoding="jacobi", return_dict_in_generate=True
            )
            texts.append(output.sequences.tolist())
        assert texts[0] == texts[1], kind
        assert (Path(folder) / "README.md").exists()


def zero_curves(folder) -> dict[str, list[float]]:
    """The losses of a whole model and of an adapter with ZeRO 2 and 3; for 3 the model is named and loads sharded."""
    found = {}
    for stage in (2, 3):
        for kind in ("untied", "lora", "draft"):
            name = f"{kind} {stage}"
            settings = {"save_strategy": "steps", "save_steps": STEPS // 2, "eval_prompts": 2}
            if stage == 3:
                base = Path(folder) / "base"
                settings |= {"model": str(base), "model_init_kwargs": {"attn_implementation": "sdpa"}}
                if os.environ["RANK"] == "0" and not base.exists():
                    tiny_model(**KINDS[kind][0]).save_pretrained(base)
            trainer = sharded_trainer(f"{folder}/{name}", kind, 2, **with_zero(stage) | settings)
            assert stage == 2 or not any(weight.numel() for weight in trainer.head.model.lm_head.parameters())
            trainer.train()
            found[name] = curve(trainer)
            found[f"{name}, evaluated"] = [trainer.evaluate()["eval_loss"]]
            trainer.save_model(f"{folder}/{name}/saved")
            resumed = sharded_trainer(f"{folder}/{name}", kind, 2, **with_zero(stage) | settings)
            resumed.train(resume_from_checkpoint=f"{folder}/{name}/checkpoint-{STEPS // 2}")
            found[f"{name}, resumed"] = curve(resumed)
        trainer = sharded_trainer(f"{folder}/{stage}", "untied", 2, **with_zero(stage))
        with pytest.raises(ValueError, match=r"ZeRO Stage 3|a trainer trains once, and not after an evaluation"):
            trainer.evaluate()
            trainer.train()
    return found


@pytest.mark.multiprocess
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed")
def test_zero_trains_saves_and_resumes_as_one_process_does(tmp_path):
    tiny_model().save_pretrained(tmp_path / "zero_curves-2" / "base")
    two = on_processes(2, "zero_curves", tmp_path, module="test_sharded")
    prompt = torch.tensor([[5, 6, 7, 8]])
    for kind in ("untied", "lora", "draft"):
        alone = sharded_trainer(tmp_path / kind, kind)
        alone.train()
        loss = alone.evaluate()["eval_loss"]
        expected = hf_jacobi.enable(alone.model).generate(prompt, max_new_tokens=24, decoding="jacobi").tolist()
        for stage in (2, 3):
            name = f"{kind} {stage}"
            assert two[name] == pytest.approx(curve(alone), rel=1e-4), name
            assert two[f"{name}, resumed"] == pytest.approx(curve(alone), rel=1e-4), name
            assert two[f"{name}, evaluated"] == pytest.approx([loss], rel=1e-4), name
            model = saved(tmp_path / "zero_curves-2" / name / "saved", kind)
            assert hf_jacobi.enable(model).generate(prompt, max_new_tokens=24, decoding="jacobi").tolist() == expected


def saved(folder: Path, kind: str):
    """The model in a saved folder."""
    if "peft_config" not in KINDS[kind][1]:
        return AutoModelForCausalLM.from_pretrained(folder)
    from peft import PeftModel

    return PeftModel.from_pretrained(tiny_model(**KINDS[kind][0]), folder)


def in_half_precision(folder) -> list[str]:
    """The dtypes of the sums in a training step."""
    shard()
    trainer = sharded_trainer(folder, "untied", 2, bf16=True, max_steps=1, eval_prompts=0)
    compute, found = trainer.sum_losses, []

    def sum_losses(*args):
        terms = compute(*args)
        found.extend(str(term.dtype) for term in terms if isinstance(term, torch.Tensor))
        return terms

    trainer.sum_losses = sum_losses
    trainer.train()
    return found


@pytest.mark.multiprocess
def test_sums_over_thousands_of_tokens_are_not_rounded_to_half_precision(tmp_path):
    found = on_processes(2, "in_half_precision", tmp_path, module="test_sharded")
    assert len(found) >= 4 and set(found) == {"torch.float32"}


def gathers(folder) -> dict[str, int]:
    """How often a step gathers weights, by kind of head and size of chunks."""
    shard()
    count = [0]

    def counted(gather):
        def gathering(*args, **kwargs):
            count[0] += 1
            return gather(*args, **kwargs)

        return gathering

    for name in ("all_gather_single", "all_gather_into_tensor"):  # torch 2.13 has both, and calls the first
        if hasattr(torch.distributed, name):
            setattr(torch.distributed, name, counted(getattr(torch.distributed, name)))

    def of_a_step(kind: str, size: int) -> int:
        trainer = sharded_trainer(folder, kind, 2, loss_chunk_size=size, max_steps=1, eval_prompts=0)
        step, found = trainer.training_step, []

        def training_step(*args, **kwargs):
            count[0] = 0
            loss = step(*args, **kwargs)
            found.append(count[0])
            return loss

        trainer.training_step = training_step
        trainer.train()
        return found[0]

    def of_a_head_by_itself(size: int) -> int:
        """Gathered whenever it is called, like any layer."""
        trainer = sharded_trainer(folder, "untied", 2, loss_chunk_size=size, eval_prompts=0)
        fully_shard(trainer.model.lm_head, reshard_after_forward=True)
        fully_shard(trainer.model)
        count[0] = 0
        trainer.compute_loss(trainer.model, trainer.data_collator(packed(3))).backward()
        assert all(weight.grad is not None for weight in trainer.model.parameters())
        return count[0]

    found = {f"{kind} {size}": of_a_step(kind, size) for kind in ("untied", "tied") for size in (1000, 8)}
    return found | {f"alone {size}": of_a_head_by_itself(size) for size in (1000, 8)}


@pytest.mark.multiprocess
def test_the_head_is_gathered_once_however_many_chunks_there_are(tmp_path):
    found = on_processes(2, "gathers", tmp_path, module="test_sharded")
    for kind in ("untied", "tied", "alone"):
        assert found[f"{kind} 8"] == found[f"{kind} 1000"] > 0, found


def test_fsdp_that_would_be_left_out_is_refused(tmp_path, monkeypatch):
    """accelerate has none for CPU processes, and silently copies the model to each of them."""
    trainer = sharded_trainer(tmp_path, "untied")
    refuse_without_sharding(trainer)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    refuse_without_sharding(trainer)  # with one process there is nothing to shard
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    with pytest.raises(ValueError, match="accelerate does not support FSDP for processes on a cpu"):
        refuse_without_sharding(trainer)
