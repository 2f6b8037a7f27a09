"""Evaluation counts each row once, however many processes share it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import tiny_model
from packed_rows import packed
from test_trainer import assert_same, gradients_of_a_step, lora, rows, trainer_of

import hf_jacobi


BACKEND = {"ddp_backend": "gloo"} if "LOCAL_RANK" in os.environ else {}
SCRIPT = """
import sys
import json
sys.path[:0] = {path!r}
import torch; torch.set_num_threads(1)
import torch.distributed as dist
from {module} import {function}
found = {function}({folder!r})
if not dist.is_initialized() or dist.get_rank() == 0:
    open({out!r}, "w").write(json.dumps(found))
if dist.is_initialized():
    dist.barrier()
    dist.destroy_process_group()
"""


def on_processes(count: int, function: str, tmp_path: Path, module: str = "test_evaluation"):
    """Calls a function of a test file with a folder in several processes; returns the first one's result."""
    here = Path(__file__).parent
    path = [str(here), str(here.parent), str(Path(hf_jacobi.__file__).parents[1])]
    out = tmp_path / f"{function}-{count}.json"
    file = out.with_suffix(".py")
    file.write_text(
        SCRIPT.format(
            path=path, module=module, function=function, folder=str(tmp_path / f"{function}-{count}"), out=str(out)
        )
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count), "--standalone", str(file)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    run = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(out.read_text())


def figures(folder) -> dict[str, list]:
    """The figures of 5, 4, 1 and 7 rows, two per batch, and of a mixture of experts."""
    found = {}
    for name, settings in (("llama", {}), ("mixtral", {"output_router_logits": True, "router_aux_loss_coef": 0.5})):
        model = tiny_model(name, **settings)
        for count in (5, 4, 1, 7):
            trainer = trainer_of(
                model, folder, eval_dataset=rows(count, seed=1), per_device_eval_batch_size=2, eval_prompts=2,
                eval_max_new_tokens=8, **BACKEND,
            )  # fmt: skip
            metrics = trainer.evaluate() | trainer.predict(packed(count, seed=2)).metrics
            for key, value in metrics.items():
                if not key.endswith(("runtime", "per_second", "preparation_time")):
                    found[f"{name} {count} {key}"] = value
    return found


@pytest.mark.multiprocess
@pytest.mark.parametrize("processes", [2, 3])
def test_each_row_counts_once_on_any_number_of_processes(tmp_path, monkeypatch, processes):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    alone = figures(tmp_path / "alone")
    assert {"llama 5 eval_agreement", "llama 5 test_noisy_accuracy", "mixtral 5 eval_router_loss"} <= alone.keys()
    assert on_processes(processes, "figures", tmp_path) == pytest.approx(alone, abs=1e-6, rel=1e-6)


def test_rows_that_training_drops_are_evaluated(tmp_path, monkeypatch):
    """`dataloader_drop_last` keeps training batches equal; an evaluation without a batch had a loss of 0."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    some = {"eval_dataset": rows(5, seed=1), "per_device_eval_batch_size": 2}
    whole = trainer_of(tiny_model(), tmp_path, **some).evaluate()["eval_loss"]
    trainer = trainer_of(tiny_model(), tmp_path, dataloader_drop_last=True, **some)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(whole, rel=1e-6)
    assert trainer.predict(rows(5, seed=1)).metrics["test_loss"] == pytest.approx(whole, rel=1e-6)
    assert trainer.args.dataloader_drop_last


def weights_after(folder) -> list[list[float]]:
    """Sums over the weights of all processes after an evaluation and then a training."""
    from accelerate.utils import gather_object
    from datasets import IterableDataset

    trainer = trainer_of(
        tiny_model(), folder, eval_dataset=rows(4, seed=1), per_device_train_batch_size=2, learning_rate=1e-2,
        max_steps=3, **BACKEND,
    )  # fmt: skip
    trainer.evaluate()
    with pytest.raises(ValueError, match="is a stream, of which 2 processes would count some rows twice"):
        trainer.evaluate(IterableDataset.from_generator(lambda: iter(packed(5))))
    trainer.train()
    weights = torch.cat([weight.detach().flatten() for weight in trainer.head.model.parameters()])
    return gather_object([[float(weights.sum()), float(weights.norm())]])


@pytest.mark.multiprocess
def test_processes_train_together_after_an_evaluation(tmp_path):
    one, other = on_processes(2, "weights_after", tmp_path)
    assert one == other


def gradients_after_an_evaluation(folder) -> list[dict[str, list[float]]]:
    """Those of all processes, for the whole model and for an adapter."""
    from accelerate.utils import gather_object

    settings = {"evaluations": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2} | BACKEND
    found = gradients_of_a_step(folder, **settings) | gradients_of_a_step(folder, peft_config=lora(), **settings)
    return gather_object([{name.removeprefix("module."): value.flatten().tolist() for name, value in found.items()}])


@pytest.mark.multiprocess
def test_processes_have_the_gradients_of_one_after_an_evaluation(tmp_path, monkeypatch):
    """transformers mistakes a model prepared for evaluation for a wrapped one: each process would train alone."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    one, other = on_processes(2, "gradients_after_an_evaluation", tmp_path)
    assert one == other
    alone = gradients_of_a_step(tmp_path) | gradients_of_a_step(tmp_path, peft_config=lora())
    assert_same({name: torch.tensor(value) for name, value in one.items()},
                {name: value.flatten() for name, value in alone.items()})  # fmt: skip
