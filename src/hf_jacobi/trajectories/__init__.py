"""Makes training data: trajectories, the noise schedule, packing. Needs the extra `train`."""

import importlib
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .collect import TRAJECTORY_FEATURES, collect_trajectories, read_report
    from .corruption import pack_completions
    from .ngrams import build_ngram_table
    from .noise import converged_prefix, nearest_state, noise_level, noise_targets
    from .packing import PACKED_FEATURES, pack_trajectories
    from .report import CollectReport
    from .statistics import PackingStatistics, packing_statistics


__all__ = [
    "PACKED_FEATURES",
    "TRAJECTORY_FEATURES",
    "CollectReport",
    "PackingStatistics",
    "build_ngram_table",
    "collect_trajectories",
    "converged_prefix",
    "nearest_state",
    "noise_level",
    "noise_targets",
    "pack_completions",
    "pack_trajectories",
    "packing_statistics",
    "read_report",
]

# Imported on first use, because `encoding` must also work without `datasets`.
_MODULES = {
    "TRAJECTORY_FEATURES": "collect",
    "collect_trajectories": "collect",
    "read_report": "collect",
    "build_ngram_table": "ngrams",
    "converged_prefix": "noise",
    "nearest_state": "noise",
    "noise_level": "noise",
    "noise_targets": "noise",
    "pack_completions": "corruption",
    "PACKED_FEATURES": "packing",
    "pack_trajectories": "packing",
    "CollectReport": "report",
    "PackingStatistics": "statistics",
    "packing_statistics": "statistics",
}


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f".{_MODULES[name]}", __name__)
    except ModuleNotFoundError as error:
        from ..decoding.errors import missing_extra

        raise missing_extra(f"hf_jacobi.{name}", error.name, "train") from error
    globals()[name] = getattr(module, name)
    return globals()[name]
