"""How many guesses a forward tries, for given costs and given chances."""

from __future__ import annotations

import random

import pytest

from hf_jacobi.decoding.adaptive import (
    ALLOWED,
    BEYOND,
    DRAFTED,
    DRAFTED_PRIOR,
    FREE,
    MATCHED,
    PROBE,
    PROBES,
    SUREST,
    TABLED,
    TRIAL,
    Choice,
    Copied,
    Economy,
    Odds,
    Outlook,
    Own,
    Tabled,
)
from hf_jacobi.decoding.costs import CostCurve
from hf_jacobi.decoding.ngram_table import LEVELS, chance_of


CURVES = {
    "cheap": CostCurve.of(0.003),
    "line": CostCurve.of(0.06),
    "step": CostCurve.of([[1, 77], [2, 130], [4, 136], [8, 163], [16, 216]]),
    "dear": CostCurve.of(0.9),
}


def test_odds_follow_what_came_true():
    odds = Odds(0.5, 4.0)
    for _ in range(300):
        odds.see(True)
    assert odds.share > 0.99
    for _ in range(30):
        odds.see(False)
    assert odds.share < 0.5, "the past is forgotten"


def test_each_right_guess_makes_the_match_of_what_is_copied_longer():
    chances = Copied().chances(rank=0, match=1, count=12)
    expected = MATCHED[0]
    for place, chance in enumerate(chances):
        assert chance == pytest.approx(expected)
        expected *= MATCHED[min(place + 1, len(MATCHED) - 1)]
    assert Copied().chances(rank=1, match=3, count=1)[0] < Copied().chances(rank=0, match=3, count=1)[0]


def test_what_is_copied_is_worth_what_came_true_after_matches_as_long():
    copied = Copied()
    for _ in range(50):
        copied.see([(3, [7, 8]), (2, [9])], token=7)
        copied.see([(1, [7])], token=9)
    assert copied.chances(0, 3, 1)[0] > 0.9 and copied.chances(0, 1, 1)[0] < 0.1
    assert copied.chances(1, 2, 1)[0] < 0.1


def test_own_predictions_are_followed_however_few_tokens_a_forward_brings():
    own = Own(4)
    own.see([0], [1, 2, 3])
    for token in (1, 2, 9):
        own.see([token], [])
    assert [(odds.correct, odds.tried) for odds in own.odds[:2]] == [(1, 1), (1, 1)]
    assert (own.odds[2].correct, own.odds[2].tried) == (0, 1) and not own.pending
    at_once = Own(4)
    at_once.see([0], [1, 2, 3])
    at_once.see([1, 2, 9, 9], [])
    assert at_once.chances(4) == own.chances(4)


def test_far_predictions_are_believed_like_those_before_them():
    own = Own(16)
    for _ in range(20):
        own.see([1], [1])
    chances = own.chances(16)
    assert chances[0] > 0.95 and chances[15] > 0.45 and chances == sorted(chances, reverse=True)


@pytest.mark.parametrize("name", CURVES)
def test_as_many_guesses_are_tried_as_bring_most_tokens_per_cost(name):
    draw, curve, tried = random.Random(0), CURVES[name], set()
    for _ in range(200):
        rows = [sorted((draw.random() ** 2 for _ in range(draw.randrange(20))), reverse=True) for _ in range(2)]
        tokens = [1 + sum(sum(row[:guesses]) for row in rows) / 2 for guesses in range(20)]
        paces = [brought / curve.cost(1 + guesses) for guesses, brought in enumerate(tokens)]
        economy = Economy(curve)
        economy.progress = 1000  # much may be lost
        economy.probing = 1000.0
        best, probes, _ = economy.decide(list(map(Outlook, rows)))
        assert not probes and (paces[best] == pytest.approx(max(paces)) or (best == 0 and max(paces) < 1.04))
        tried.add(best)
    assert (len(tried) > 3) == (name != "dear")


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("promised", [[], [0.3, 0.1], [0.9] * 15], ids=["nothing", "little", "much"])
def test_whatever_is_promised_and_never_kept_what_is_lost_is_bounded(name, promised):
    """Here no guess is correct, and no chance is updated."""
    economy = Economy(CURVES[name])
    probes = 0
    for tokens in range(2, 400):
        guesses, probing, _ = economy.decide([Outlook(promised)])
        probes += probing
        economy.took(guesses, tokens)
        lost = economy.spent - tokens
        assert lost <= 0.01 * tokens + 1.8 + economy.cost(max(PROBE, len(promised))) - 1, (
            f"{lost:.2f} forwards after {tokens} tokens"
        )
    assert lost < 0.03 * tokens
    assert probes > 0 or name == "dear" or promised, "own predictions are probed from time to time"


def test_a_probe_tries_own_predictions_and_rests_by_its_cost():
    gaps = {}
    for name in ("line", "step"):
        economy = Economy(CURVES[name])
        at = []
        for tokens in range(2, 400):
            guesses, probing, _ = economy.decide([Outlook([])])
            assert (guesses, probing) in ((PROBE, True), (0, False))
            at += [tokens] * probing
            economy.took(guesses, tokens)
        gaps[name] = 400 / len(at)
    assert 10 < gaps["line"] < 40 < gaps["step"] < 150


def test_what_was_won_may_be_tried_again():
    economy = Economy(CURVES["step"])
    economy.took(0, 2)
    economy.lost[False] = 48.0
    assert economy.decide([Outlook([0.9] * 15)]) == Choice(0), "the account is overdrawn"
    economy.lost[False] -= 58
    assert economy.decide([Outlook([0.9] * 15)]).guesses > 5


def test_a_draft_only_adapter_doubles_the_positions_of_what_is_tried():
    economy = Economy(CostCurve.of(0.1), CostCurve.of(0.1))
    assert [economy.cost(guesses, adapter=True) for guesses in range(3)] == pytest.approx([1.0, 1.3, 1.5])


def test_the_progress_of_a_batch_is_that_of_the_slowest_row():
    """One row with good guesses does not slow the other rows down for long."""
    economy = Economy(CostCurve.of(0.5))
    for tokens in range(2, 200):
        guesses, *_ = economy.decide([Outlook([0.99] * 15), Outlook([0.0] * 15)])
        economy.took(guesses, tokens)
    assert economy.spent < 1.03 * 200


def outlook(own: float, drafted: float, hand: list[float]) -> Outlook:
    """The outlook for predictions that are correct with these chances, independently."""
    return Outlook(hand, [own**place for place in range(1, 16)], [drafted**place for place in range(1, 16)])


@pytest.mark.parametrize(
    ("own", "drafted", "adapter"), [(0.2, 0.9, True), (0.9, 0.9, False), (0.9, 0.3, False), (0.2, 0.3, False)]
)
def test_an_adapter_takes_part_while_it_brings_more_tokens_per_cost(own, drafted, adapter):
    """Here all chances are known: drafts with it have its chances, drafts without it the model's own."""
    curve = CostCurve.of([[1, 100], [2, 106], [16, 180], [32, 280]])
    economy = Economy(curve, curve)
    took_part, was_drafted, text = [], False, 2.0
    for _ in range(300):
        share = drafted if was_drafted else own
        row = outlook(own, drafted, [share**place for place in range(1, 16)])
        guesses, _, was_drafted = economy.decide([row], drafted=was_drafted)
        took_part.append(was_drafted)
        text += sum(share**place for place in range(guesses + 1))
        economy.took(guesses, int(text), was_drafted)
    assert (sum(took_part) > 250) == adapter
    assert sum(took_part) < 60 or adapter, "it is probed from time to time, since nothing else shows how good it is"


@pytest.mark.parametrize("name", CURVES)
def test_an_adapter_that_is_never_right_costs_little(name):
    economy = Economy(CURVES[name], CURVES[name])
    was_drafted = False
    for tokens in range(2, 400):
        row = outlook(0.0, 0.9, [0.9**place for place in range(1, 16)] if was_drafted else [])
        guesses, _, was_drafted = economy.decide([row], idle=not was_drafted, drafted=was_drafted)
        economy.took(guesses, tokens, was_drafted)
    assert economy.spent < 1.03 * 400 + economy.cost(15, adapter=True)


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_a_failed_trial_of_the_adapter_costs_little_and_keeps_nothing_else_from_being_tried(name, kept):
    """Copied guesses are correct with the chance `kept`, and the adapter, which promises much, never is."""
    plain = CURVES[name]
    economy = Economy(plain, CostCurve(tuple((width, cost + 0.2 * (width > 1)) for width, cost in plain.points)))
    drafted, trusted, copied = False, Own(15, DRAFTED, DRAFTED_PRIOR), [kept**place for place in range(1, 16)]
    text, tried = 2.0, 0
    for _ in range(64):
        chances = trusted.chances(15)
        hand = max(chances if drafted else [], copied, key=sum)
        guesses, _, adapter = economy.decide(
            [Outlook(hand, [0.01] * 15, chances, copied)], idle=not drafted, drafted=drafted
        )
        if hand is copied:
            tried += guesses > 0
            text += sum(copied[:guesses])
        trusted.see([7], [8] * guesses if adapter else [])
        text, drafted = text + 1, adapter
        economy.took(guesses, int(text), adapter)
    assert economy.spent - economy.progress < FREE + TRIAL + 2 * (ALLOWED * 64 + plain.cost(8) - 1)
    pays = max((1 + sum(copied[:guesses])) / plain.cost(1 + guesses) for guesses in range(1, 16)) > 1.1
    assert tried > 20 or not pays


def test_an_adapter_is_tried_where_it_pays_only_after_its_first_forward():
    """Two forwards, of which only the second commits more than one token, would not be worth their cost here."""
    plain = CostCurve.of([[1, 100], [2, 106], [4, 118], [8, 141], [16, 177]])
    economy = Economy(plain, CostCurve(tuple((width, cost + 0.26 * (width > 1)) for width, cost in plain.points)))
    row = outlook(0.05, 0.6, [])
    for tokens in range(2, 20):
        if economy.decide([row], idle=True).adapter:
            break
        economy.took(0, tokens)
    else:
        pytest.fail("the adapter was never tried")
    assert sum(row.drafted[:3]) + 2 < 2 * economy.cost(3, adapter=True)


def test_what_an_adapter_has_lost_does_not_count_against_other_guesses():
    curve = CostCurve.of([[1, 100], [2, 106], [16, 177]])
    economy = Economy(curve, curve)
    economy.took(0, 30)
    economy.lost = {False: 0.0, True: 2.0}
    assert economy.decide([Outlook([0.3])]).guesses == 1
    economy.lost = {False: 2.0, True: 0.0}
    assert economy.decide([Outlook([0.3])]).guesses != 1
    economy.lost = {False: 2.0, True: -2.0}
    assert economy.decide([Outlook([0.3])]).guesses == 1, "what it has gained does count"


def test_a_table_is_trusted_as_far_as_its_guesses_were_correct():
    tabled = Tabled()
    assert tabled.chance(8) == pytest.approx(TABLED * chance_of(8))
    for _ in range(40):
        tabled.see((7, 8), 9)
    assert tabled.chance(8) < 0.3 * chance_of(8) and tabled.chance(15) < 0.3, "all levels fall together"
    for _ in range(100):
        tabled.see((7, 8), 7)
        tabled.see(None, 7)
    assert chance_of(8) < tabled.chance(8) <= 1
    assert tabled.chance(LEVELS - 1) == SUREST


def test_promises_that_fail_again_and_again_lose_no_more_than_the_account_allows():
    economy, tried = Economy(CURVES["cheap"]), 0
    for progress in range(2, 130):
        choice = economy.decide([Outlook([0.95**place for place in range(1, 16)])])
        tried += choice.guesses > 0
        economy.took(choice.guesses, progress)
    assert tried >= 2, "what promises so much is tried"
    most = CURVES["cheap"].cost(16) - 1  # of the last try
    assert economy.lost[False] <= FREE + ALLOWED * 129 + BEYOND + most


def test_a_probe_of_an_adapter_waits_until_its_budget_covers_it():
    plain = CostCurve.of([[1, 1.0], [16, 1.2]])
    economy = Economy(plain, CostCurve(((1, 1.0), (2, 1.5), (32, 1.9))))
    row, first = Outlook([0.9], copied=[0.9]), None
    for progress in range(2, 300, 2):
        choice = economy.decide([row])
        economy.took(choice.guesses, progress, choice.adapter)
        if choice.adapter:
            first = progress
            break
    loss = economy.cost(1, True) - economy.cost(1)
    assert first is not None and loss <= PROBES * first
    assert PROBES * (first - 4) <= loss
