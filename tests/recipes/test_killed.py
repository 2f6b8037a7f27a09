"""A recipe that is killed at any moment and started again writes the same files, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from models import tiny_tokenizer, trained_model


HERE = Path(__file__).parent
OF_CLOCK = (".seconds", ".lock")  # run times and locks, which differ from run to run


def contents(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file() and file.suffix not in OF_CLOCK)
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_recipe_killed_at_every_stage_writes_the_same_files(tmp_path):
    model = tmp_path / "base"
    trained_model().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    recipe = {
        "model": str(model),
        "prompts": [" ".join(f"w{3 + (7 * row + 5 * place) % 90}" for place in range(5)) for row in range(9)],
        "collect": {"max_new_tokens": 16, "batch_size": 4, "shard_size": 3},
        "pack": {"window_size": 2, "shard_size": 3},
        "train": {
            "max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 3e-3, "use_cpu": True,
            "per_device_train_batch_size": 2,
        },
        "choose": {"count": 3, "max_new_tokens": 8, "batch_size": 3},
        "phases": [{"block_size": 4}, {"block_size": 8, "train": {"max_steps": 2, "save_steps": 1}}],
    }  # fmt: skip
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe))
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(HERE / "recipe_in_pieces.py"), str(file), str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-3000:]
    kills = (tmp_path / "kills.txt").read_text().splitlines()
    for stage in ("phase 1 of 2: collect", "phase 1 of 2: pack", "phase 1 of 2: train", "phase 1 of 2: choose"):
        assert any(kill.startswith(stage) for kill in kills), (stage, kills)
    assert any("phase 2" in kill for kill in kills)
    whole, pieces = contents(tmp_path / "whole"), contents(tmp_path / "pieces")
    assert "model/model.safetensors" in whole and "report.json" in whole
    assert whole.keys() == pieces.keys()
    assert [name for name, content in whole.items() if pieces[name] != content] == []
