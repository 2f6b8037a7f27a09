"""The benchmark of the default settings, on a tiny checkpoint."""

import json
import sys
import time
from collections import Counter

import pytest
from models import padded_prompts, tiny_tokenizer, trained_model

import hf_jacobi
from benchmarks.default_settings import main, prompts
from benchmarks.turns import Turns, take_turns


def test_four_kinds_of_prompts_take_turns():
    found = prompts(40)
    assert Counter(kind for kind, _ in found) == dict.fromkeys(("chat", "code", "arithmetic", "rewriting"), 10)
    assert len({prompt for _, prompt in found}) == 40


@pytest.mark.parametrize("given", [[], ["--given", "[[1, 1.0], [16, 1.2]]"]])
def test_every_prompt_is_decoded_both_ways(tmp_path, monkeypatch, capsys, given):
    trained_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    output = tmp_path / "figures.json"
    command = ["x", "--model", str(tmp_path / "model"), "--prompts", "3", "--max-new-tokens", "34", "--repeats", "2"]
    monkeypatch.setattr(sys, "argv", [*command, "--output", str(output), *given])
    main()
    report = json.loads(output.read_text())
    assert len(report["rows"]) == 3 and all(row["Jacobi"]["identical"] for row in report["rows"])
    found = report["summary"]["Jacobi"]
    assert 0 < found["worst"] <= min(row["Jacobi"]["speedup"] for row in report["rows"]) <= found["total"]
    assert len(report["costs"]) == (not given)
    assert "total" in capsys.readouterr().out


def test_calls_take_turns_by_the_tokens_they_have_written():
    now = [0.0]
    turns = Turns(["a", "b"], lambda: now[0])
    order = []
    while turns.running:
        name = turns.turn
        order.append(name)
        began = turns.wait(name)
        now[0] += 1.0 if name == "a" else 3.0
        turns.tokens[name] += 1 if name == "a" else 2
        turns.yield_from(name, began, done=turns.tokens[name] >= 4)
    assert order == list("abaaba"), "the one with the fewest tokens goes on, the first among equals"
    assert turns.seconds == {"a": 4.0, "b": 6.0}


def test_an_error_in_one_call_ends_the_others_and_is_raised():
    model = hf_jacobi.enable(trained_model())
    inputs = padded_prompts(1) | {"max_new_tokens": 8, "do_sample": False}
    ways = {"AR": (model, {"decoding": "ar"}), "wrong": (model, {"decoding": "no"})}
    with pytest.raises(ValueError, match="`decoding` must be one of"):
        take_turns(ways, inputs, time.perf_counter, 1)
