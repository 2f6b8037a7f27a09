"""How models are shared: model cards."""
