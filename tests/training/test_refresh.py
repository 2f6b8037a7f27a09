"""Fresh trajectories during training: from the current model, on the next prompts, the same after a resume."""

import json

import pytest
import torch
from datasets import load_dataset
from models import tiny_tokenizer, trained_model
from test_trainer import arguments, rows
from transformers import AutoModelForCausalLM

from hf_jacobi import JacobiForcingTrainer, Refresh, collect_trajectories, pack_trajectories
from hf_jacobi.decoding.errors import UsageError
from hf_jacobi.training.refresh import RefreshedRows


PROMPTS = [" ".join(f"w{3 + (7 * row + 5 * place) % 90}" for place in range(3 + row % 4)) for row in range(5)]


@pytest.fixture(autouse=True)
def _cpu(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def trainer_of(folder, seen=None, **settings) -> JacobiForcingTrainer:
    defaults = {
        "per_device_train_batch_size": 2, "max_steps": 6, "refresh_steps": 2, "save_strategy": "steps",
        "save_steps": 1, "learning_rate": 3e-3, "gradient_accumulation_steps": 2,
    }  # fmt: skip
    data = settings.pop("train_dataset", None) or rows(8)
    refresh = settings.pop("refresh", Refresh(PROMPTS, count=2, max_new_tokens=16, window_size=2))
    trainer = JacobiForcingTrainer(
        trained_model(), arguments(folder, **defaults | settings), train_dataset=data,
        processing_class=tiny_tokenizer(), refresh=refresh,
    )  # fmt: skip
    if seen is not None:
        collate = trainer.data_collator
        trainer.data_collator = lambda batch: seen.append([row["input_ids"] for row in batch]) or collate(batch)
    return trainer


def test_rows_come_from_the_model_as_it_is_on_the_next_prompts(tmp_path):
    seen = []
    trainer_of(tmp_path, seen).train()
    pools = [[row["input_ids"] for row in rows(8)]]
    for step, places in ((2, (0, 1)), (4, (2, 3))):
        folder = tmp_path / "refresh" / f"step-{step}"
        pools.append(load_dataset(str(folder / "packed"), split="train")["input_ids"])
        collected = load_dataset(str(folder / "trajectories"), split="train")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{step}").eval()
        prompts = [PROMPTS[place] for place in places]
        expected = collect_trajectories(model, tiny_tokenizer(), prompts, 4, 16, progress=False)
        assert collected[:] == expected[:]
    assert len(seen) == 12, "six steps of two batches"
    for number, batch in enumerate(seen):
        pool = max(0, number - 1) // 4  # the batch after a refresh was read before it
        assert all(row in pools[pool] for row in batch), (number, pool)
    assert not (tmp_path / "refresh" / "step-6").exists(), "nothing would be trained on it"


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_a_resumed_training_refreshes_as_it_would_have(tmp_path, step):
    whole = trainer_of(tmp_path)
    whole.train()
    files = {file: file.read_bytes() for file in (tmp_path / "refresh").rglob("*.parquet")}
    again = trainer_of(tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert {file: file.read_bytes() for file in (tmp_path / "refresh").rglob("*.parquet")} == files
    for (name, one), other in zip(whole.model.named_parameters(), again.model.parameters()):
        assert torch.equal(one, other), name


def test_a_training_that_begins_anew_leaves_no_rows_of_the_one_before(tmp_path):
    trainer_of(tmp_path, max_steps=3).train()
    stale = tmp_path / "refresh" / "step-2" / "packed" / ".hf_jacobi.json"
    stale.write_text(json.dumps({"kind": "packed"}))
    trainer_of(tmp_path, max_steps=3, learning_rate=1e-2).train()
    assert "window_size" in stale.read_text()


def test_a_resume_without_its_rows_is_refused(tmp_path):
    trainer_of(tmp_path, max_steps=3).train()
    (tmp_path / "refresh").rename(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="which this training needs to resume, does not exist"):
        trainer_of(tmp_path, max_steps=3).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_each_turn_of_some_rows_holds_each_of_them_once(tmp_path):
    args = arguments(tmp_path, per_device_train_batch_size=2, max_steps=10, refresh_steps=4)
    order = RefreshedRows(list(range(3)), args)
    order.pools |= {1: list(range(10, 17)), 2: [20]}
    drawn = [order[number] for number in range(len(order))]
    assert len(drawn) == 20 and sorted(drawn[:3]) == sorted(drawn[3:6]) == [0, 1, 2]
    assert max(drawn[:10]) < 3 and set(drawn[10:17]) == set(range(10, 17)) and set(drawn[18:]) == {20}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"refresh": None}, "`refresh_steps` needs `refresh`"),
        ({"refresh_steps": None}, "`refresh` needs `refresh_steps`"),
        ({"refresh_steps": 0}, "`refresh_steps` must be at least 1"),
        ({"refresh": PROMPTS}, "must be a Refresh, got list"),
        ({"max_steps": -1}, "needs max_steps above 0"),
        ({"dataloader_num_workers": 1}, "needs dataloader_num_workers=0"),
        ({"refresh": Refresh([])}, "at least one prompt"),
    ],
)
def test_a_refresh_that_cannot_be_had_is_refused(tmp_path, settings, message):
    with pytest.raises(UsageError, match=message):
        trainer_of(tmp_path, **settings)


def test_the_block_size_comes_from_the_settings_where_the_rows_do_not_show_it(tmp_path):
    row = {"prompt_ids": [5, 6], "completion_ids": [8], "block_size": 4, "trajectories": [[[7], [8]]]}
    short = pack_trajectories([row] * 4, window_size=1, progress=False)
    with pytest.raises(UsageError, match="needs `block_size`"):
        trainer_of(tmp_path, train_dataset=short)
    trainer_of(tmp_path, train_dataset=short, block_size=4, max_steps=3).train()
    collected = load_dataset(str(tmp_path / "refresh" / "step-2" / "trajectories"), split="train")
    assert set(collected["block_size"]) == {4}


def test_what_is_decided_elsewhere_is_refused():
    with pytest.raises(UsageError, match=r"refresh.collect must not hold 'block_size'"):
        Refresh(PROMPTS, collect={"block_size": 4})
    with pytest.raises(UsageError, match=r"refresh.count"):
        Refresh(PROMPTS, count=0)
