"""`JacobiConfig` refuses invalid settings, and survives a round trip through JSON."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from hf_jacobi import JacobiConfig


@pytest.mark.parametrize(
    "setting",
    [
        {"block_size": 0},
        {"block_size": 2.5},
        {"block_size": True},
        {"max_blocks": 0},
        {"pool_size": -1},
        {"ngram_size": 0},
        {"spawn_ratio": 0.0},
        {"spawn_ratio": 1.5},
        {"spawn_ratio": "most"},
        {"window": "round"},
        {"draft_init": "magic"},
        {"seed": 1.5},
        {"adaptive": 1},
        {"pool_prompt": None},
        {"position_cost": -0.1},
        {"position_cost": float("nan")},
        {"adaptive": True, "window": "block"},
    ],
)
def test_bad_values_are_named(setting):
    name, value = next(iter(setting.items()))
    with pytest.raises(ValueError, match=name) as error:
        JacobiConfig(**setting)
    assert repr(value) in str(error.value)


def test_round_trip():
    for config in (JacobiConfig(), JacobiConfig(block_size=64, max_blocks=2, spawn_ratio=0.5, seed=3, window="block")):
        assert JacobiConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        assert JacobiConfig.coerce(config.to_dict()) == JacobiConfig.coerce(config) == config


def test_numbers_of_numpy_become_those_of_python():
    config = JacobiConfig(block_size=np.int64(8), pool_size=np.int32(2), spawn_ratio=np.float32(0.5), seed=np.int64(3))
    assert config == JacobiConfig(block_size=8, pool_size=2, spawn_ratio=0.5, seed=3)
    assert JacobiConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_settings_are_named():
    with pytest.raises(ValueError, match="blocksize"):
        JacobiConfig.from_dict({"blocksize": 8})
    with pytest.raises(ValueError, match="JacobiConfig"):
        JacobiConfig.coerce(8)


def test_the_window_adapts_itself_unless_a_size_is_given():
    assert JacobiConfig().adapts and JacobiConfig().size == 16
    assert not JacobiConfig(block_size=32).adapts
    assert JacobiConfig(block_size=32, adaptive=True).adapts
    assert not JacobiConfig(window="block").adapts


def test_what_was_left_out_stays_left_out():
    assert dataclasses.replace(JacobiConfig(), window="block") == JacobiConfig(window="block")
    assert not dataclasses.replace(JacobiConfig(), block_size=64).adapts
    assert not JacobiConfig.from_dict(JacobiConfig().to_dict() | {"window": "block"}).adapts
