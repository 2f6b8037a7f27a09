"""The README is short, its program runs after its first command, and `scripts/run-docs` knows the pages."""

import contextlib
import io
import re
import runpy
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def test_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 120


def test_run_docs_skips_and_changes_only_blocks_that_exist():
    assert runpy.run_path(str(ROOT / "scripts" / "run-docs"), run_name="run_docs")["stale"]() == []


@pytest.mark.parametrize("cache", [None, "elsewhere"])
def test_use_runs_without_a_way_to_the_hub(tmp_path, monkeypatch, cache):
    """It uses only the included checkpoint, wherever other weights are kept."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if cache:
        monkeypatch.setenv("HF_JACOBI_CACHE", str(tmp_path / cache))
    program = re.search(r"## Use\n```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL).group(1)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(program, "README", "exec"), {})
    tokens_per_forward = float(re.search(r"^([0-9.]+) \[", printed.getvalue(), re.MULTILINE).group(1))
    assert tokens_per_forward > 1.5
    assert (tmp_path / "my-checkpoint" / "generation_config.json").exists()
