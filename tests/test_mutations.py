"""Every mutation of `scripts/mutate` still finds the text that it replaces, and yields valid Python."""

import ast
import importlib.machinery
import importlib.util
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
LOADER = importlib.machinery.SourceFileLoader("mutate", str(ROOT / "scripts" / "mutate"))
mutate = importlib.util.module_from_spec(importlib.util.spec_from_loader("mutate", LOADER))
LOADER.exec_module(mutate)


@pytest.mark.parametrize("mutation", mutate.MUTATIONS, ids=lambda mutation: f"{mutation.kind}: {mutation.change}")
def test_it_can_be_made(mutation):
    source = (ROOT / "src" / "hf_jacobi" / mutation.file).read_text(encoding="utf-8")
    ast.parse(mutate.mutated(mutation, source))


def test_all_kinds_are_there():
    kinds = {"drafting", "mask", "positions", "acceptance", "moving of slots", "noise", "noise schedule"}
    kinds |= {"twin positions", "whose forward", "what is refused", "wrappers"}
    assert {mutation.kind for mutation in mutate.MUTATIONS} == kinds
