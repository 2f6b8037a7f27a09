"""Measurements for the figures in the README and docs; each script says how to run it."""
