# For mypy alone: the module that `carried.py` writes beside the published `custom_generate.py`.

from typing import Any

ADAPTER: str | None  # its repository
DECODING: str
JACOBI: dict[str, Any]
