"""Trains in phases, each of which collects, packs, trains and chooses a checkpoint. Needs the extra `train`."""

from .recipe import Phase, Recipe, read_recipe
from .run import run_recipe


__all__ = ["Phase", "Recipe", "read_recipe", "run_recipe"]
