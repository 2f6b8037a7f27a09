"""Fixtures shared by all tests."""

from __future__ import annotations

import os


os.environ["OMP_NUM_THREADS"] = "1"  # models this small gain nothing from more threads; tests run in parallel

import pytest
import torch
import transformers
from deprecations import watch
from fixtures import permuted_copy_model
from hypothesis import HealthCheck, settings

import hf_jacobi
from hf_jacobi.decoding import timing
from hf_jacobi.decoding.costs import CostCurve


torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
# `--hypothesis-profile` selects one: `.ci/run` also uses `thorough`, and `search` draws new examples in every run.
QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("default", max_examples=100, derandomize=True, **QUIET)
settings.register_profile("thorough", max_examples=500, derandomize=True, **QUIET)
settings.register_profile("search", max_examples=1000, **QUIET)
settings.load_profile("default")


@pytest.fixture(scope="session")
def permuted_copy():
    """A model whose text Jacobi decoding guesses well, while n-gram lookup does not (see `permuted_copy_model`)."""
    return hf_jacobi.enable(permuted_copy_model())


@pytest.fixture(autouse=True)
def _same_random_numbers_in_every_run():
    """How many drafts a random model accepts depends on its weights and on its inputs."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _same_costs_in_every_run(request, monkeypatch):
    """The measured time of a forward varies; only tests with the marker `timed` measure it."""
    monkeypatch.setattr(timing, "MOST", 0)  # what later forwards take changes nothing
    if not request.node.get_closest_marker("timed"):
        monkeypatch.setattr(timing, "measure", lambda *call: CostCurve.of(0.01))
        monkeypatch.setattr(timing, "measure_adapter", lambda *call: 0.0)


@pytest.fixture(autouse=True)
def _undo_process_wide_enable():
    """A test that enables every model of the process leaves no trace."""
    yield
    hf_jacobi.disable()


@pytest.fixture(autouse=True)
def _own_use_of_deprecated_names_fails(monkeypatch):
    """The package must not call what other libraries have deprecated."""
    watch(monkeypatch)
