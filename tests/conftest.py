"""Fixtures shared by all tests."""

from __future__ import annotations

import pytest
import torch
import transformers
from deprecations import watch
from fixtures import train_permuted_copy

import hf_jacobi


torch.set_num_threads(1)
transformers.logging.set_verbosity_error()


@pytest.fixture(scope="session")
def permuted_copy():
    """A model whose text Jacobi decoding guesses well and n-gram look-up does not (see `train_permuted_copy`)."""
    return hf_jacobi.enable(train_permuted_copy())


@pytest.fixture(autouse=True)
def _undo_process_wide_enable():
    """A test that enables every model of the process leaves no trace."""
    yield
    hf_jacobi.disable()


@pytest.fixture(autouse=True)
def _own_use_of_deprecated_names_fails(monkeypatch):
    """What others have deprecated, the package does not call."""
    watch(monkeypatch)
