"""How training data is made: trajectories, the noise schedule, packing. Needs what the extra `train` brings."""

from .collect import TRAJECTORY_FEATURES, collect_trajectories, read_report
from .noise import converged_prefix, nearest_state, noise_level, noise_targets
from .packing import PACKED_FEATURES, pack_trajectories
from .report import CollectReport
from .statistics import PackingStatistics, packing_statistics


__all__ = [
    "PACKED_FEATURES",
    "TRAJECTORY_FEATURES",
    "CollectReport",
    "PackingStatistics",
    "collect_trajectories",
    "converged_prefix",
    "nearest_state",
    "noise_level",
    "noise_targets",
    "pack_trajectories",
    "packing_statistics",
    "read_report",
]
