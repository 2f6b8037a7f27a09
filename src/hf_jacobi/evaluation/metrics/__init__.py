"""
Metrics for the library `evaluate`, loaded by path and thus without a network:

```python
>>> agreement = evaluate.load(path_of("agreement"))
>>> agreement.compute(predictions=[[5, 6, 7]], references=[[5, 6, 8]])
{'tokens': 0.6666666666666666, 'texts': 0.0}
```
"""

from __future__ import annotations

from pathlib import Path

from ...decoding.errors import UsageError


NAMES = ("agreement", "speedup", "tokens_per_forward")


def path_of(name: str) -> str:
    """
    The path of a metric for `evaluate.load`.

    Args:
        name: one of `NAMES`.

    Raises:
        `ValueError`: there is no such metric.
    """
    if name not in NAMES:
        raise UsageError(f"there is no metric {name!r}: name one of {', '.join(NAMES)}.")
    return str(Path(__file__).parent / name)
