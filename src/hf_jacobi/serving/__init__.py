"""How a model is served to others. Each file needs a package of its own, and imports it when it is used."""
