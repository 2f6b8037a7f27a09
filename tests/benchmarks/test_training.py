"""The comparison of draft-only training in one forward and in two."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import training


pytestmark = pytest.mark.slow


def test_drafts(tmp_path, monkeypatch):
    training.small_model(layers=2, hidden=128, vocabulary=512).save_pretrained(tmp_path / "model")
    report = tmp_path / "report.json"
    command = ["training", "drafts", "--model", str(tmp_path / "model"), "--length", "32", "--steps", "1"]
    monkeypatch.setattr(sys, "argv", [*command, "--attention", "eager", "--output", str(report)])
    training.main()
    results = json.loads(report.read_text())["results"]
    assert list(results) == ["one/1", "two/1", "two/2", "two/4"]
    one, two = results["one/1"], results["two/1"]
    assert one["noisy_tokens"] == two["noisy_tokens"] < results["two/4"]["noisy_tokens"] / 2
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
