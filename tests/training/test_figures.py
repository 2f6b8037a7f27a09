"""Figures of decoded text: correct answers only, and text that loops."""

import pytest
from models import tiny_model
from test_trainer import rows, trainer_of

from hf_jacobi.decoding.errors import UsageError
from hf_jacobi.training.figures import Tally, repetition, score_function


@pytest.fixture(autouse=True)
def _cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")


@pytest.mark.parametrize(
    "text, expected",
    [([], (0, 0)), ([1, 2, 3], (0, 0)), ([1, 2, 3, 4, 5], (0, 2)), ([1, 2] * 4, (3, 5)), ([7] * 10, (6, 7))],
)
def test_repetition_counts_four_grams_that_stood_in_the_text_before(text, expected):
    assert repetition(text) == expected


def test_right_answers_have_tokens_per_forward_of_their_own():
    tally = Tally(scored=True)
    tally.add([1, 2, 3, 4, 5, 6], 2, [1, 2, 3, 4, 5, 6], [1, 2, 9], is_right=True)
    tally.add([7] * 12, 2, [7] * 12, [7, 7, 7], is_right=False)
    assert tally.figures() == {
        "tokens_per_forward": 18 / 4,
        "agreement": 5 / 6,
        "repetition": 8 / 12,
        "score": 0.5,
        "tokens_per_forward_right": 3.0,
    }
    assert "score" not in Tally().figures()
    nothing_right = Tally(scored=True)
    nothing_right.add([1], 1, [1], [1])
    assert nothing_right.figures()["score"] == 0 and "tokens_per_forward_right" not in nothing_right.figures()


def test_an_evaluation_tells_right_answers_apart(tmp_path):
    asked = []

    def score(prompt: str, completion: str) -> bool:
        asked.append((prompt, completion))
        return len(asked) % 2 == 1

    trainer = trainer_of(
        tiny_model(), tmp_path, eval_dataset=rows(4), eval_prompts=4, eval_max_new_tokens=24, eval_score=score
    )
    metrics = trainer.evaluate()
    assert metrics["eval_score"] == 0.5 and 0 <= metrics["eval_repetition"] <= 1
    assert 1 <= metrics["eval_tokens_per_forward_right"] <= 24
    assert len(asked) == 4 and all(text.startswith("w") for pair in asked for text in pair)
    trainer.decoding.score = lambda prompt, completion: True
    everything = trainer.evaluate()
    assert everything["eval_tokens_per_forward_right"] == everything["eval_tokens_per_forward"]
    assert {"eval_score", "eval_repetition"} <= set(trainer.state.log_history[-1])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"eval_score": "exact"}, "must be a function"),
        ({"eval_score": max}, "pass an `eval_dataset`"),
        ({"eval_score": max, "eval_dataset": True, "processing_class": None}, "pass the tokenizer"),
    ],
)
def test_a_score_that_cannot_be_had_is_refused(tmp_path, settings, message):
    if settings.get("eval_dataset"):
        settings = settings | {"eval_dataset": rows(2), "eval_prompts": 1}
    with pytest.raises(UsageError, match=message):
        trainer_of(tiny_model(), tmp_path, **settings)


def test_scoring_functions_are_found_by_name(tmp_path, monkeypatch):
    (tmp_path / "own_scores.py").write_text("def right(prompt, completion):\n    return completion == prompt\n")
    monkeypatch.chdir(tmp_path)
    for name in ("own_scores:right", "own_scores.py:right", f"{tmp_path}/own_scores.py:right"):
        assert score_function(name)("a", "a") and not score_function(name)("a", "b")
    for name, message in (
        ("own_scores", "must be module:function"),
        ("own_scores:wrong", "has no function 'wrong'"),
        ("no_scores:right", "module no_scores cannot be imported"),
        ("no_scores.py:right", "no file no_scores.py"),
    ):
        with pytest.raises(UsageError, match=message):
            score_function(name)
