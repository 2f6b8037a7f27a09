"""The notebooks run from top to bottom, each in under three minutes, and are stored with their outputs."""

import resource
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from hf_jacobi.cli.demo_model import demo_checkpoint


FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PICTURES = {"01_decode_in_parallel": 2, "02_train_your_own": 3, "03_tune_and_publish": 1}
MOST = 180  # seconds of computing, which other processes on the machine do not lengthen


@pytest.fixture(scope="module")
def demo_model():
    """SmolLM2, unpacked or downloaded beforehand, so that this does not count as time of a notebook."""
    try:
        demo_checkpoint()
    except OSError as error:
        pytest.skip(str(error))


def pictures(notebook) -> int:
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_all_are_there():
    assert [path.stem for path in NOTEBOOKS] == list(PICTURES)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_kept_as_it_ran(path):
    kept = nbformat.read(path, 4)
    nbformat.validate(kept)
    assert pictures(kept) == PICTURES[path.stem]
    counts = [cell.execution_count for cell in kept.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "from top to bottom, once"


def computed() -> float:
    """CPU seconds of all child processes that have ended: the kernels and their children."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.notebook
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, demo_model, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(path, 4)
    start = computed()
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    assert pictures(notebook) == PICTURES[path.stem]
    assert 1 < computed() - start < MOST
