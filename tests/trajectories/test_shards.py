"""The folder in which a data set grows, tested alone."""

import pytest
from datasets import Features, Value

from hf_jacobi.trajectories.shards import ShardFolder


FEATURES = Features({"number": Value("int64")})


def test_settings_that_another_run_wrote_meanwhile_are_refused(tmp_path):
    first, second = (ShardFolder(tmp_path, "rows", FEATURES, {"size": size}) for size in (1, 2))
    with first.locked():
        first.write(0, [{"number": 1}], {}, "digest", 1)
    with pytest.raises(ValueError, match="size 1, now 2"), second.locked():
        pass
    assert first.dataset()[:] == {"number": [1]}


def test_a_folder_that_is_only_looked_at_stays_as_it_is(tmp_path):
    ShardFolder(tmp_path / "new", "rows", FEATURES, {})
    assert not list((tmp_path / "new").iterdir())
