"""Tables of n-grams against a slow count with dictionaries."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hf_jacobi import UsageError, build_ngram_table
from hf_jacobi.cli import main
from hf_jacobi.decoding.files import read_json
from hf_jacobi.decoding.ngram_table import LEVELS, TABLE, NgramTable, key_of
from hf_jacobi.trajectories.ngrams import MOST_DISCOUNT, keys_of


TEXTS = st.lists(
    st.tuples(st.lists(st.integers(0, 3), max_size=4), st.lists(st.integers(0, 3), min_size=1, max_size=30)),
    min_size=1,
    max_size=4,
)


def rows_of(*texts) -> list[dict]:
    return [{"prompt_ids": list(prompt), "completion_ids": list(text)} for prompt, text in texts]


class Slow:
    """Interpolated absolute discounting, by recursion over dictionaries."""

    def __init__(self, texts, order: int):
        self.counts: dict[tuple, Counter] = defaultdict(Counter)
        for prompt, text in texts:
            whole = [*prompt[-order:], *text] if prompt else list(text)
            for place in range(len(whole) - len(text), len(whole)):
                for length in range(min(order, place) + 1):
                    self.counts[tuple(whole[place - length : place])][whole[place]] += 1

    def discount(self, length: int) -> float:
        times = [
            count for context, tokens in self.counts.items() if len(context) == length for count in tokens.values()
        ]
        once, twice = times.count(1), times.count(2)
        return min(once / max(1, once + 2 * twice), MOST_DISCOUNT)

    def chance(self, context: tuple, token: int) -> float:
        tokens = self.counts[context]
        total = sum(tokens.values())
        if not context:
            return tokens[token] / total
        discount = self.discount(len(context))
        shorter = self.chance(context[1:], token)
        return max(tokens[token] - discount, 0) / total + discount * len(tokens) / total * shorter

    def best(self, context: tuple) -> float:
        """The chance of the likeliest token."""
        return max(self.chance(context, token) for token in self.counts[()])


def level_of(chance: float) -> int:
    return min(int(chance * LEVELS), LEVELS - 1)


@given(TEXTS, st.integers(1, 4))
def test_a_table_says_what_a_slow_count_says(tmp_path_factory, texts, order):
    assume(any(len(prompt) + len(text) > 1 for prompt, text in texts))
    table = NgramTable.read(build_ngram_table(rows_of(*texts), tmp_path_factory.mktemp("t"), order=order))
    slow = Slow(texts, order)
    for context in slow.counts:
        if not context:
            continue
        best, found = slow.best(context), table.next(context)
        if found is None:
            assert level_of(best) <= 0 or best * LEVELS % 1 < 1e-6
            continue
        token, level = found
        assert slow.chance(context, token) == pytest.approx(best) or level == 0
        assert abs(level + 0.5 - best * LEVELS) <= 0.5 + 1e-6 or level == LEVELS - 1


def test_keys_are_those_of_the_lookup():
    contexts = np.random.default_rng(0).integers(0, 2**31, (50, 5))
    assert keys_of(contexts).tolist() == [key_of(context) for context in contexts.tolist()]


def test_the_prompt_is_context_but_not_text(tmp_path):
    table = NgramTable.read(build_ngram_table(rows_of(([1, 2, 3], [4, 5]), ([1, 2, 3], [4, 6])), tmp_path))
    assert table.next([3])[0] == table.next([2, 3])[0] == 4
    assert table.next([1]) is table.next([1, 2]) is None, "the prompt itself is not predicted"


def test_the_most_frequent_contexts_are_kept(tmp_path):
    texts = [([1], [2, 3] * 20), ([1], [4, 5])]
    table = NgramTable.read(build_ngram_table(rows_of(*texts), tmp_path, order=1, max_entries=2))
    assert len(table) == 2
    assert table.next([2])[0] == 3 and table.next([3])[0] == 2 and table.next([4]) is None


def test_the_same_rows_make_the_same_file(tmp_path):
    rows = rows_of(([1], list(range(9)) * 3), ([2], [5, 4, 3] * 4))
    files = [build_ngram_table(rows, tmp_path / name).read_bytes() for name in "ab"]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{"text": "a"}], {}, "row 0 has no list `prompt_ids`"),
        (
            [{"prompt_ids": [1], "completion_ids": [2]}, {"prompt_ids": None, "completion_ids": [2]}],
            {},
            "row 1 has no",
        ),
        ([{"prompt_ids": [1], "completion_ids": 5}], {}, "row 0 has no list `completion_ids`"),
        ([None], {}, "row 0 has no list `prompt_ids`"),
        ([{"prompt_ids": [1], "completion_ids": []}], {}, "there is no text to count"),
        ([], {}, "there is no text to count"),
        ([{"prompt_ids": [], "completion_ids": [5]}], {}, "no context that is often followed by the same token"),
        ([{"prompt_ids": [1], "completion_ids": [2, -1]}], {}, "`completion_ids` of row 0 holds -1"),
        ([{"prompt_ids": [1], "completion_ids": [2]}], {"order": 9}, "`order` must be from 1 to 8, got 9"),
        ([{"prompt_ids": [1], "completion_ids": [2]}], {"max_entries": 0}, "`max_entries` must be"),
    ],
)
def test_bad_input_is_refused(tmp_path, rows, settings, message):
    with pytest.raises(UsageError, match=message):
        build_ngram_table(rows, tmp_path, **settings)


def test_a_folder_that_cannot_hold_the_table_is_refused(tmp_path):
    rows = rows_of(([1], [2, 3] * 9))
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file: name the folder"):
        build_ngram_table(rows, tmp_path / "file")
    (tmp_path / "config.json").write_text('{"vocab_size": 3}')
    with pytest.raises(UsageError, match=r"the texts have tokens up to 3, and the vocabulary of .* ends at 2"):
        build_ngram_table(rows, tmp_path)


def test_the_command_writes_a_table_that_a_checkpoint_names(tmp_path, capsys, monkeypatch):
    from datasets import Dataset

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    files = [tmp_path / "some.parquet", tmp_path / "more.parquet"]
    for file, text in zip(files, ([2, 3] * 20, [4, 5] * 20)):
        Dataset.from_list(rows_of(([1], text))).to_parquet(file)
    command = ["ngrams", "--trajectories", *map(str, files), "--output-dir"]
    assert main([*command, str(tmp_path / "new")]) == 0
    assert "ngram_table=" in capsys.readouterr().out and not (tmp_path / "new" / "generation_config.json").exists()
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    assert main([*command, str(checkpoint)]) == 0
    assert "generation_config.json" in capsys.readouterr().out
    settings = read_json(checkpoint / "generation_config.json")
    (checkpoint / "generation_config.json").write_text('{"decoding": "ar"}')
    assert main([*command, str(checkpoint)]) == 0
    assert "The settings keep decoding='ar'" in capsys.readouterr().out
    assert settings["decoding"] == "jacobi" and settings["jacobi"]["ngram_table"] == TABLE
    table = NgramTable.read(checkpoint / TABLE)
    assert table.next([2])[0] == 3 and table.next([4])[0] == 5
    assert (checkpoint / TABLE).read_bytes() == (tmp_path / "new" / TABLE).read_bytes()
