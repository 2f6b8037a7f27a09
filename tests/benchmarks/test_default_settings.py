"""The benchmark of the default settings, on a tiny checkpoint."""

import json
import sys
from collections import Counter

import pytest
from models import tiny_tokenizer, trained_model

from benchmarks.default_settings import main, prompts


def test_four_kinds_of_prompts_take_turns():
    found = prompts(40)
    assert Counter(kind for kind, _ in found) == dict.fromkeys(("chat", "code", "arithmetic", "rewriting"), 10)
    assert len({prompt for _, prompt in found}) == 40


@pytest.mark.parametrize("given", [[], ["--given", "[[1, 1.0], [16, 1.2]]"]])
def test_every_prompt_is_decoded_both_ways(tmp_path, monkeypatch, capsys, given):
    trained_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    output = tmp_path / "figures.json"
    command = ["x", "--model", str(tmp_path / "model"), "--prompts", "3", "--max-new-tokens", "34", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", [*command, "--output", str(output), *given])
    main()
    report = json.loads(output.read_text())
    assert len(report["rows"]) == 3 and all(row["Jacobi"]["identical"] for row in report["rows"])
    found = report["summary"]["Jacobi"]
    assert 0 < found["worst"] <= min(row["Jacobi"]["speedup"] for row in report["rows"]) <= found["total"]
    assert len(report["costs"]) == (not given)
    assert "total" in capsys.readouterr().out
