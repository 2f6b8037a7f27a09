"""How others serve a model: vLLM, the server of transformers, a chat page."""
