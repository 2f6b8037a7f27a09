"""The prompts for SmolLM2, and the card of its adapter."""

import json
from collections import Counter

import pytest
from card_table import metadata_of, table_of

from benchmarks.smollm2.prompts import HELD_OUT, KINDS, TOPICS, TRAIN, is_held_out, prompts
from benchmarks.smollm2.ship import CARD, card
from hf_jacobi.cli.models import DEMO_ADAPTER
from hf_jacobi.evaluation.prompts import CHAT
from hf_jacobi.hub.card import EVALUATION


def test_what_is_held_out_is_asked_for_nowhere_in_training():
    train, held_out = prompts(held_out=False), prompts(held_out=True)
    for rows, most in ((train, TRAIN), (held_out, HELD_OUT)):
        counts = Counter(row["kind"] for row in rows)
        assert counts.keys() == KINDS.keys() and max(counts.values()) == most and min(counts.values()) >= 10
    texts = [{row["messages"][0]["content"] for row in rows} for rows in (train, held_out)]
    assert len(texts[0]) == len(train) and len(texts[1]) == len(held_out) and not texts[0] & texts[1]
    assert not set(CHAT) & (texts[0] | texts[1])
    held_out_topics = [topic for topic in TOPICS if is_held_out(topic)]
    assert held_out_topics
    asked = [row["messages"][0]["content"] for row in train if row["kind"] == "instructions"]
    endings = [f" {topic}{end}" for topic in held_out_topics for end in ("?", ".", " in simple", " important")]
    assert not [prompt for prompt in asked for ending in endings if ending in prompt]


@pytest.mark.parametrize("read", [table_of, metadata_of])
def test_the_figures_on_the_card_are_those_that_were_measured(read):
    measured = json.loads((DEMO_ADAPTER / EVALUATION).read_text())["results"]
    expected = {(row["dataset"], row["decoding"]): row["metrics"] for row in measured}
    shown = read(CARD.read_text())
    assert shown.keys() == expected.keys() and len(shown) > 20
    for row, metrics in shown.items():
        assert metrics == pytest.approx(expected[row], rel=1e-3)


def test_the_card_is_up_to_date():
    assert CARD.read_text() == card()


def test_what_ships_is_small():
    assert sum(path.stat().st_size for path in DEMO_ADAPTER.iterdir()) < 16e6
