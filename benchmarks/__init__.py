"""Measurements behind the figures of the README; each script says how to run it."""
