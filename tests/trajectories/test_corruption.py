"""Plain completions become rows whose noise is drawn from the vocabulary."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset, Features, List, Value
from models import VOCABULARY, tiny_model, tiny_tokenizer

import hf_jacobi
from hf_jacobi.trajectories import pack_completions, pack_trajectories
from hf_jacobi.trajectories.packing import COLUMNS


@pytest.fixture(autouse=True)
def _no_shared_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def completions(count: int = 4, length: int = 22) -> list[dict]:
    return [
        {
            "prompt_ids": [5, 6, number + 7],
            "completion_ids": [(number * 7 + place) % 80 + 10 for place in range(length)],
        }
        for number in range(count)
    ]


def noisy_blocks(row: dict) -> list[dict]:
    """Tokens, first position and wrong positions of each noisy block."""
    found, previous = [], None
    for token, position, block, twin in zip(
        *(row[name] for name in ("input_ids", "position_ids", "block_ids", "twin_ids"))
    ):
        if block < 0:
            continue
        if (block, position) != previous:
            found.append({"tokens": [], "start": position, "wrong": []})
        found[-1]["tokens"].append(token)
        found[-1]["wrong"] += [position] if twin >= 0 else []
        previous = (block, position + 1)
    return found


def test_blocks_are_a_token_of_the_text_and_random_ones():
    for row, source in zip(pack_completions(completions(), tiny_tokenizer(), block_size=8), completions()):
        text = source["prompt_ids"] + source["completion_ids"]
        blocks = noisy_blocks(row)
        assert [len(block["tokens"]) for block in blocks] == [8, 8, 6]
        assert [block["start"] for block in blocks] == [3, 11, 19]
        for block in blocks:
            assert block["tokens"][0] == text[block["start"]]
            assert not {*block["tokens"][1:]} <= {*text[block["start"] :][: len(block["tokens"])]}
            assert block["wrong"], "something is left to learn"
        assert row["input_ids"][: len(text)] == text


@pytest.mark.parametrize("settings", [{"noise": "uniform"}, {"noise": "corrupt", "corrupt_share": 0.5}])
@pytest.mark.parametrize("kind", ["uint8", "int16", "uint16", "uint32", "int64"])
def test_noise_does_not_depend_on_the_integers_that_hold_the_text(settings, kind):
    expected = pack_completions(completions(), 100_000, block_size=8, **settings).to_list()
    columns = ("prompt_ids", "completion_ids")
    narrow = Dataset.from_list(completions(), features=Features({name: List(Value(kind)) for name in columns}))
    arrays = [{name: np.array(row[name], kind) for name in columns} for row in completions()]
    for rows in (narrow, arrays):
        assert pack_completions(rows, 100_000, block_size=8, **settings).to_list() == expected


def test_special_tokens_are_not_drawn_unless_nothing_else_is_left():
    row = pack_completions(completions(1, 2000), tiny_tokenizer(), block_size=8)[0]
    drawn = {token for block in noisy_blocks(row) for token in block["tokens"][1:]}
    assert drawn == set(range(3, VOCABULARY))
    row = pack_completions(completions(1, 200), tiny_tokenizer(size=3), block_size=8)[0]
    assert {token for block in noisy_blocks(row) for token in block["tokens"][1:]} == {0, 1, 2}


def test_a_share_of_the_text_is_corrupted():
    row = pack_completions(completions(1, 4000), 1000, 8, "corrupt", corrupt_share=0.3)[0]
    clean = row["block_ids"].count(-1)
    text = row["input_ids"][:clean]
    wrong = sum(
        token != text[position] for token, position in zip(row["input_ids"][clean:], row["position_ids"][clean:])
    )
    assert wrong / 4000 == pytest.approx(0.3 * 7 / 8, abs=0.03)


def test_the_seed_governs_and_samples_draw_by_themselves(tmp_path):
    settings = {"block_size": 4, "noisy_copies": 3}
    packs = [pack_completions(completions(), tiny_tokenizer(), seed=seed, **settings)[:] for seed in (0, 0, 1)]
    assert packs[0] == packs[1] != packs[2]
    assert pack_completions(completions(2), tiny_tokenizer(), **settings)[:] == {
        name: values[:2] for name, values in packs[0].items()
    }
    again = pack_completions(completions(), tiny_tokenizer(), output_dir=tmp_path / "out", shard_size=3, **settings)
    assert again[:] == packs[0]
    with pytest.raises(ValueError, match="noise"):
        pack_completions(
            completions(), tiny_tokenizer(), noise="corrupt", output_dir=tmp_path / "out", shard_size=3, **settings
        )


def test_copies_begin_their_blocks_elsewhere():
    row = pack_completions(completions(1), tiny_tokenizer(), block_size=8, noisy_copies=4)[0]
    starts = [block["start"] for block in noisy_blocks(row)]
    copies = [index for index, start in enumerate(starts) if start == 3]
    assert len(copies) == 4 and len({*starts}) > 6


def test_rows_are_no_longer_than_asked():
    packed = pack_completions(completions(), tiny_tokenizer(), block_size=4, noisy_copies=2, max_length=40)
    assert max(map(len, packed["input_ids"])) == 39  # 3 and 12, and twice 12
    packed = pack_completions(completions(8), tiny_tokenizer(), block_size=4, max_length=100, pack_samples=True)
    assert max(map(len, packed["input_ids"])) <= 100 and max(packed[0]["seq_ids"]) == 1


def test_trajectories_are_completions_too_and_columns_are_the_same():
    trajectory = {**completions(1)[0], "block_size": 22}
    trajectory["trajectories"] = [[[9] * 22, trajectory["completion_ids"]]]
    for rows in ([trajectory], Dataset.from_list([trajectory])):
        packed = pack_completions(rows, tiny_tokenizer())
        assert packed.features == pack_trajectories([trajectory]).features and set(packed[0]) == set(COLUMNS)


def test_the_trainer_learns_from_them(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    losses = []
    for copies in (1, 3):
        packed = pack_completions(completions(8, 21), tiny_tokenizer(), block_size=4, noisy_copies=copies)
        arguments = hf_jacobi.JacobiForcingConfig(
            tmp_path, report_to="none", use_cpu=True, disable_tqdm=True, eval_prompts=0, logging_steps=1, max_steps=12,
            adapter_scope="draft", learning_rate=3e-2, save_strategy="no",
        )  # fmt: skip
        adapter = peft.LoraConfig(r=8, target_modules="all-linear")
        trainer = hf_jacobi.JacobiForcingTrainer(
            tiny_model(), arguments, packed, processing_class=tiny_tokenizer(), peft_config=adapter
        )
        trainer.train()
        losses.append([line["consistency_loss"] for line in trainer.state.log_history if "consistency_loss" in line])
        assert trainer.block_size == 4
    assert all(one[-1] < 0.9 * one[0] for one in losses)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"noise": "pink"}, "`noise` must be one of"),
        ({"block_size": 1}, "block_size"),
        ({"noisy_copies": 0}, "noisy_copies"),
        ({"noise": "corrupt", "corrupt_share": 0.0}, r"`corrupt_share` must be above 0 and at most 1, got 0.0"),
        ({"corrupt_share": 0.5}, "`corrupt_share` is for noise='corrupt', not 'uniform'"),
        ({"pack_samples": True}, "max_length"),
        ({"max_length": 5}, "no sample that fits into max_length=5"),
        ({"tokenizer": "gpt2"}, "must be a tokenizer"),
        ({"completions": [{"prompt_ids": [1]}]}, "completion_ids"),
        ({"completions": [{"prompt_ids": [1], "completion_ids": ["a"]}]}, "holds 'a', which is not a token"),
        ({"completions": [{"prompt_ids": [1], "completion_ids": [True]}]}, "holds True, which is not a token"),
        ({"completions": [{"prompt_ids": [1], "completion_ids": []}]}, "every completion is empty"),
        ({"completions": iter(completions())}, "through only once"),
    ],
)
def test_what_cannot_be_packed_is_refused(settings, said):
    with pytest.raises(hf_jacobi.UsageError, match=said):
        pack_completions(**{"completions": completions(), "tokenizer": tiny_tokenizer()} | settings)


def test_what_is_no_data_is_refused():
    with pytest.raises(hf_jacobi.UsageError, match="`completions` must be rows, got NoneType"):
        pack_completions(None, tiny_tokenizer())
