"""Measures decoding: speed, settings, scores, and plots of them. The plots need the extra `eval`."""
