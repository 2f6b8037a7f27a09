"""Serving a model to others. Each file needs a different package, and imports it only when it is used."""
