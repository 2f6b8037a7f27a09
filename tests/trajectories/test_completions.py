"""Completions from elsewhere: the states are the model's, the text is the given one."""

import itertools
import json

import numpy as np
import pytest
import torch
from models import VOCABULARY, tiny_model, tiny_tokenizer

import hf_jacobi
from hf_jacobi.cli import main
from hf_jacobi.decoding.errors import UsageError
from hf_jacobi.trajectories import collect_trajectories, read_report


N = 8
SETTINGS = {"block_size": N, "max_new_tokens": 30, "batch_size": 4, "progress": False}


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (3 + 5 * row % 9,), generator=generator).tolist() for row in range(count)]


def given(rows) -> list[dict]:
    return [{"prompt_ids": row["prompt_ids"], "completion_ids": row["completion_ids"]} for row in rows]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral-window", "gemma3", "opt"])
@pytest.mark.parametrize("positions", [2048, 12])
def test_the_models_own_text_gets_the_trajectories_it_has_by_decoding(name, positions):
    model = tiny_model(name)
    rows = collect_trajectories(model, tiny_tokenizer(), prompts(6), **SETTINGS)
    assert len(set(map(len, rows["completion_ids"]))) > 1 or name != "llama", "texts of different lengths"
    settings = SETTINGS | {"positions_per_forward": positions, "check": True}
    again = collect_trajectories(model, tiny_tokenizer(), completions=given(rows), **settings)
    assert again[:] == rows[:]


def test_a_state_of_other_text_is_the_given_prefix_and_what_the_model_says_from_there_on():
    model = tiny_model()
    texts = prompts(3, seed=9)
    pairs = [{"prompt_ids": prompt, "completion_ids": text * 3} for prompt, text in zip(prompts(3), texts)]
    rows = collect_trajectories(model, tiny_tokenizer(), completions=pairs, **SETTINGS)
    unlike = 0
    for row, pair in zip(rows, pairs):
        assert row["completion_ids"] == pair["completion_ids"][:30]
        for number, states in enumerate(row["trajectories"]):
            final = row["completion_ids"][number * N : (number + 1) * N]
            prefix = row["prompt_ids"] + row["completion_ids"][: number * N]
            assert states[-1] == final
            for state, following in itertools.pairwise(states):
                right = next((place for place in range(len(final)) if state[place] != final[place]), len(final))
                logits = model(torch.tensor([prefix + state])).logits[0, len(prefix) - 1 : -1]
                own = logits.argmax(-1).tolist()
                assert following[: right + 1] == final[: right + 1]
                assert following[right + 1 :] == own[right + 1 :]
                unlike += own[right] != final[right]
    assert unlike, "the model would have written something else"


def test_a_check_leaves_out_and_names_what_the_model_would_not_have_written(tmp_path):
    model = tiny_model()
    pairs = given(collect_trajectories(model, tiny_tokenizer(), prompts(5), **SETTINGS))
    odd = pairs[2]["completion_ids"]
    odd[4] = 3 + (odd[4] - 2) % 90
    with pytest.warns(UserWarning, match="completion of prompt 2 is not the model's greedy text: its token 4 is 'w"):
        rows = collect_trajectories(
            model, tiny_tokenizer(), completions=pairs, output_dir=tmp_path / "a", check=True, **SETTINGS
        )
    assert rows["prompt_id"] == ["0", "1", "3", "4"]
    report = read_report(tmp_path / "a")
    assert report.other_text == 1 and report.empty == 0 and report.sequences == 4
    assert report.given_tokens == sum(len(pair["completion_ids"]) for pair in pairs)
    assert report.given_tokens - len(odd) < report.own_tokens < report.given_tokens
    assert len(collect_trajectories(model, tiny_tokenizer(), completions=pairs, **SETTINGS)) == 5
    with pytest.raises(UsageError, match="prompt 2 is not the model's greedy text"):
        collect_trajectories(model, tiny_tokenizer(), completions=pairs, check=True, strict=True, **SETTINGS)
    with pytest.raises(UsageError, match="none of the 1 completions is the model's greedy text"):
        collect_trajectories(model, tiny_tokenizer(), completions=pairs[2:3], check=True, **SETTINGS)


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"completion": "w7 w8"}, [7, 8, 2]),
        ({"completion": "w7 w8 </s>"}, [7, 8, 2]),
        ({"completion": "w7 w8", "finish_reason": "length"}, [7, 8]),
        ({"completion": "w7 w8", "finish_reason": "MAX_TOKENS"}, [7, 8]),
        ({"completion": "w7 w8", "ended": False}, [7, 8]),
        ({"completion": "w7 w8", "ended": "False"}, [7, 8]),
        ({"completion": "w7 w8", "ended": np.bool_(False)}, [7, 8]),
        ({"completion": [{"role": "assistant", "content": "w7"}]}, [7, 2]),
        ({"completion": [7, 8]}, [7, 8]),
        ({"completion_ids": [7, 2, 9], "completion": "w5"}, [7, 2]),
        ({"completion_ids": list(range(10, 50))}, list(range(10, 40))),
    ],
)
def test_text_gets_the_end_that_engines_leave_out_and_tokens_are_taken_as_they_are(row, expected):
    rows = collect_trajectories(tiny_model(), tiny_tokenizer(), completions=[{"prompt": "w5 w6"} | row], **SETTINGS)
    assert rows[0]["completion_ids"] == expected
    assert rows[0]["ended"] == (expected[-1] == 2)


def test_bad_completions_are_named_and_the_others_kept():
    pairs = [{"prompt": "w5", "completion": text} for text in ("w7", None, 5, [VOCABULARY], "w\ud800")]
    with pytest.warns(UserWarning) as caught:
        rows = collect_trajectories(tiny_model(), tiny_tokenizer(), completions=pairs, **SETTINGS)
    assert rows["prompt_id"] == ["0"]
    said = str(caught[0].message)
    assert "prompt 1 has no completion" in said
    assert "completion of prompt 2 must be text or a list of token ids, got 5" in said
    assert "the completion of prompt 4: " in said
    assert f"completion of prompt 3 holds token {VOCABULARY}" in said


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "either `dataset`"),
        ({"dataset": ["w5"], "completions": ["w5"]}, "either `dataset`"),
        ({"dataset": ["w5"], "check": True}, "`check` is for `completions`"),
        ({"completions": [{"prompt": "w5"}]}, "need a column `completion`"),
        ({"completions": [{"prompt": "w5", "completion": "w6"}], "do_sample": True}, "already written"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        collect_trajectories(tiny_model(), tiny_tokenizer(), **SETTINGS | settings)


def test_a_folder_goes_on_with_the_same_completions_alone(tmp_path):
    pairs = [{"prompt": "w5 w6", "completion": "w7 w8"}, {"prompt": "w9", "completion": "w8"}]
    settings = SETTINGS | {"output_dir": tmp_path}
    model = tiny_model()
    first = collect_trajectories(model, tiny_tokenizer(), completions=pairs, **settings)
    assert collect_trajectories(model, tiny_tokenizer(), completions=pairs, **settings)[:] == first[:]
    with pytest.raises(UsageError, match="other data"):
        other = [pairs[0] | {"completion": "w7 w7"}, pairs[1]]
        collect_trajectories(model, tiny_tokenizer(), completions=other, **settings)
    with pytest.raises(UsageError, match="other settings"):
        collect_trajectories(model, tiny_tokenizer(), pairs, **settings)


def test_the_command_takes_completions_and_says_how_much_of_them_is_the_models(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": "w5 w6", "completion": "w7 w8"}, {"prompt": "w9", "completion": "w8"}]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["collect", "--model", str(tmp_path / "model"), "--output-dir", str(tmp_path / "out")]
    assert (
        main([*command, "--completions", str(tmp_path / "pairs.jsonl"), "--block-size", "4", "--max-new-tokens", "9"])
        == 0
    )
    assert "the model's own" in capsys.readouterr().out
    packed = hf_jacobi.pack_trajectories(
        collect_trajectories(tiny_model(), tiny_tokenizer(), completions=rows, **SETTINGS), 1
    )
    assert len(packed) == 2
    assert main([*command, "--dataset", str(tmp_path / "pairs.jsonl"), "--check"]) == 2
    assert "--check is for --completions" in capsys.readouterr().err
