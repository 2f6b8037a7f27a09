"""How training data is made: the noise schedule, and packing. Needs `datasets`, which the extra `train` brings."""

from .noise import converged_prefix, nearest_state, noise_level, noise_targets
from .packing import PACKED_FEATURES, pack_trajectories


__all__ = [
    "PACKED_FEATURES",
    "converged_prefix",
    "nearest_state",
    "noise_level",
    "noise_targets",
    "pack_trajectories",
]
