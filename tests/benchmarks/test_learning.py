"""The benchmark of losses and rows, at the smallest scale."""

import json
import sys

import pytest

from benchmarks import learning
from benchmarks.miniature import evaluate, forcing


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scope", "variants"),
    [("draft", ["lk-cut", "soft-uniform", "lk-copies"]), ("whole", ["soft", "tv-cut", "soft-refresh"])],
)
def test_variants_are_trained_and_decoded_side_by_side(tmp_path, monkeypatch, scope, variants):
    output = tmp_path / "figures.json"
    sizes = ["--base-problems", "32", "--prompts", "4", "--steps", "2", "--problems", "4"]
    folder = ["--folder", str(tmp_path / "run"), "--output", str(output)]
    for module in (forcing, evaluate):
        monkeypatch.setattr(module, "MAX_NEW_TOKENS", 40)
    monkeypatch.setattr("shutil.which", lambda name: None)  # compiling takes longer than training
    monkeypatch.setattr(sys, "argv", ["x", "--scope", scope, "--variants", *variants, *sizes, *folder])
    learning.main()
    report = json.loads(output.read_text())
    assert set(report) == {"base", *variants}
    assert all(report[name]["tokens_per_forward"] >= 1 and report[name]["seconds"] > 0 for name in variants)
    learning.main()
    assert json.loads(output.read_text()) == report, "what is there is not trained again"
