"""The prompts for SmolLM2."""

from benchmarks.smollm2.prompts import HELD_OUT, KINDS, TOPICS, TRAIN, is_held_out, prompts
from benchmarks.smollm2.ship import CARD, card
from hf_jacobi.cli.models import DEMO_ADAPTER


def test_what_is_held_out_is_asked_for_nowhere_in_training():
    train, held_out = prompts(held_out=False), prompts(held_out=True)
    assert (len(train), len(held_out)) == (TRAIN * len(KINDS), HELD_OUT * len(KINDS))
    texts = [{row["messages"][0]["content"] for row in rows} for rows in (train, held_out)]
    assert len(texts[0]) == len(train) and len(texts[1]) == len(held_out) and not texts[0] & texts[1]
    held_out_topics = [topic for topic in TOPICS if is_held_out(topic)]
    assert held_out_topics
    asked = [row["messages"][0]["content"] for row in train if row["kind"] == "instructions"]
    endings = [f" {topic}{end}" for topic in held_out_topics for end in ("?", ".", " in simple", " important")]
    assert not [prompt for prompt in asked for ending in endings if ending in prompt]


def test_the_card_is_what_was_measured():
    assert CARD.read_text() == card()


def test_what_ships_is_small():
    assert sum(path.stat().st_size for path in DEMO_ADAPTER.iterdir()) < 16e6
