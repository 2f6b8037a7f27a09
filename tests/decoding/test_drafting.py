"""What one sequence tries next: nodes, sources of guesses, blocks in flight, the adaptive window."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from hf_jacobi import JacobiConfig, UsageError
from hf_jacobi.decoding import config as settings
from hf_jacobi.decoding.drafting import FIRST_GUESSES, Draft, DraftRule, DraftSource, Lead, Ngrams, Tree, scattered
from hf_jacobi.decoding.ngram_pool import NgramPool
from hf_jacobi.decoding.ngram_table import NgramTable, key_of


NOTHING = {"draft_init": "repeat", "pool_size": 0}


def rule_of(**config) -> DraftRule:
    """After the prompt 9, 9, 9 and the first token, 10."""
    rule = DraftRule(JacobiConfig(**NOTHING | config), [9, 9, 9], "seed")
    rule.begin(10)
    return rule


def chain_of(rule: DraftRule, room: int = 99) -> tuple[int, int, list[int]]:
    return rule.start, rule.end, rule.propose(room).chain


def accept(rule: DraftRule, accepted: list[int], predicted: list[int], room: int = 99) -> tuple[int, int, list[int]]:
    """One forward that accepts the first nodes of the chain and predicts `accepted`, then `predicted`."""
    rule.observe(accepted, accepted + predicted, list(range(len(accepted))), drafted=[0] * len(accepted) + predicted)
    return chain_of(rule, room)


def draft_of(chain, *branches) -> Draft:
    draft = Draft(list(chain))
    for branch in branches:
        draft.add_branch(list(branch))
    return draft


def test_the_rules_of_drafting_need_no_torch():
    code = "import sys, hf_jacobi.decoding.drafting; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_branches_share_what_they_have_in_common():
    draft = draft_of([1, 2, 3], [2, 3], [2, 4], [5, 6], [5, 7])
    assert draft.tokens == [1, 2, 3, 4, 5, 6, 7]
    assert draft.parents == [-1, 0, 1, 1, 0, 4, 4]
    assert draft.depths == [0, 1, 2, 2, 1, 2, 2]
    assert draft.chain == [1, 2, 3] and len(draft) == 7
    assert [draft.tokens[node] for node in draft.path(6)] == [1, 5, 7]


def test_own_predictions_are_read_below_the_accepted_node_then_off_the_chain():
    draft = draft_of([1, 2, 3, 4, 5], [8, 9])
    predictions = [8, 20, 30, 40, 50, 60, 70]
    assert draft.predictions_beyond(0, predictions) == [60, 70, 40, 50]
    assert draft.predictions_beyond(1, predictions) == [30, 40, 50]
    assert draft.predictions_beyond(5, predictions) == [70, 40, 50]
    assert draft.predictions_beyond(4, predictions) == []


def test_a_block_starts_as_one_committed_token_and_first_guesses():
    for window in ("block", "sliding"):
        assert chain_of(rule_of(block_size=4, window=window)) == (3, 7, [10, 10, 10, 10])


def test_a_block_shrinks_until_it_has_converged_then_the_next_one_starts():
    rule = rule_of(block_size=4, window="block")
    chain_of(rule)
    assert accept(rule, [11], [21, 22, 23]) == (4, 7, [11, 21, 22])
    assert accept(rule, [12, 13], [31]) == (6, 7, [13])
    assert accept(rule, [14], []) == (7, 11, [14, 14, 14, 14])


def test_a_branch_that_ends_inside_the_next_block_leaves_the_grid_as_it_was():
    rule = rule_of(block_size=4, window="block")
    assert accept(rule, [11, 12, 13, 14, 15], []) == (8, 11, [15, 15, 15])


def test_a_sliding_window_is_refilled():
    rule = rule_of(block_size=4, window="sliding")
    assert accept(rule, [11, 12], [22, 23]) == (5, 9, [12, 22, 23, 23])


def test_tokens_that_came_without_the_draft_are_followed():
    rule = rule_of(block_size=4, window="sliding")
    chain_of(rule)
    accept(rule, [11], [21, 22, 23])
    before = list(rule.lead.ahead)
    rule.follow([21])
    assert chain_of(rule) == (5, 9, [21, 22, 23, 23]), "predictions beyond them stay"
    rule.follow([23, 30])
    assert chain_of(rule) == (7, 11, [30, 30, 30, 30]), "unless they prove it wrong"
    assert rule.text == [9, 9, 9, 10, 11, 21, 23, 30]
    assert rule.lead.ahead == before
    assert rule.pool.continuations([21, 23], 1, 1) == [[30]]


@pytest.mark.parametrize("window", ["block", "sliding"])
def test_a_block_is_spawned_once_the_newest_has_converged_far_enough(window):
    rule = rule_of(block_size=4, window=window, max_blocks=2, spawn_ratio=0.75)
    chain_of(rule)
    accept(rule, [11], [21, 22])
    assert rule.spawned == 0
    accept(rule, [12], [22] if window == "block" else [22, 22, 22])
    assert rule.spawned == 1
    assert rule.end - rule.start > 4


def test_no_more_than_max_blocks_are_in_flight():
    rule = rule_of(block_size=2, window="block", max_blocks=3, spawn_ratio=0.5)
    for token in range(50):
        accept(rule, [token], [0] * 10)
        assert rule.end - rule.start <= 3 * 2
    assert rule.spawned > 0


@pytest.mark.parametrize("kind", settings.DRAFT_INITS)
def test_first_guesses(kind):
    def guesses():
        rule = DraftRule(JacobiConfig(block_size=6, draft_init=kind, pool_size=0), [5, 6, 7, 8], "seed", 1000)
        rule.begin(6)
        return rule.propose(99).chain[1:]

    guess = guesses()
    assert len(guess) == 5
    if kind == "repeat":
        assert guess == [6] * 5
    elif kind == "vocabulary":
        assert len(set(guess)) == 5 and max(guess) > 8 and set(guess) <= set(range(1000))
    else:
        assert set(guess) <= {5, 6, 7, 8}
    if kind == "ngram":
        assert guess[:2] == [7, 8]
    assert guesses() == guess, "the same seed guesses the same"


def test_first_guesses_without_a_prompt():
    for kind in settings.DRAFT_INITS:
        rule = DraftRule(JacobiConfig(block_size=3, draft_init=kind), [], "seed", 5)
        rule.begin(4)
        chain = rule.propose(99).chain
        assert chain == [4, 4, 4] if kind != "vocabulary" else len(chain) == 3


def test_what_is_drawn_from_the_vocabulary_depends_on_seed_and_position_alone():
    def drawn(seed="seed", prompt=(5, 6, 7)):
        rule = rule_of_vocabulary(seed, prompt)
        first = rule.propose(99).chain[1:]
        accept(rule, [11, 12], [])
        return first, rule.propose(99).chain[1:]

    def rule_of_vocabulary(seed, prompt):
        rule = DraftRule(JacobiConfig(block_size=8, draft_init="vocabulary", pool_size=0), list(prompt), seed, 1000)
        rule.begin(9)
        return rule

    first, second = drawn()
    assert second[:5] == first[2:] and len(second) == 7
    assert drawn() == (first, second) == drawn(prompt=(8, 8, 8)) != drawn(seed="other")
    numbers = [scattered(7, position) % 10 for position in range(2000)]
    assert all(150 < numbers.count(digit) < 250 for digit in range(10))


def test_drawing_from_a_vocabulary_that_is_not_known_is_refused():
    with pytest.raises(UsageError, match="whose number is not known here"):
        DraftRule(JacobiConfig(draft_init="vocabulary"), [1], "seed")


def test_a_source_is_a_class_and_a_name(monkeypatch):
    class Count(DraftSource):
        def propose(self, text, drafted, count):
            last = (drafted or text)[-1]
            return list(range(last + 1, last + 1 + count))

    monkeypatch.setitem(FIRST_GUESSES, "count", (Count,))
    monkeypatch.setattr(settings, "DRAFT_INITS", (*settings.DRAFT_INITS, "count"))
    rule = rule_of(block_size=4, draft_init="count")
    assert rule.propose(99).chain == [10, 11, 12, 13]
    assert accept(rule, [11, 12], [20]) == (5, 9, [12, 20, 21, 22])


def test_every_name_has_its_sources():
    assert set(FIRST_GUESSES) == set(settings.DRAFT_INITS)


def test_a_draft_is_never_longer_than_there_is_room_for():
    assert chain_of(rule_of(block_size=10**9), room=5)[2] == [10] * 5
    rule = DraftRule(JacobiConfig(block_size=8, pool_size=4, ngram_size=8), [1, 2, 3, 4, 5, 6, 1], "seed")
    rule.begin(2)
    draft = rule.propose(3)
    assert draft.tokens == [2, 3, 4] and max(draft.depths) == 2


class Says(DraftSource):
    def __init__(self, *tokens: int):
        self.tokens = list(tokens)

    def propose(self, text, drafted, count):
        return self.tokens[len(drafted) : len(drafted) + count]


def test_the_source_that_was_right_further_comes_first():
    own, other = Says(1, 2, 3), Says(7)
    lead = Lead([own, other])
    assert lead.propose([], 3) == [1, 2, 3], "without evidence, the model's own"
    lead.observe([7])
    assert lead.propose([], 3) == [7, 2, 3]
    for _ in range(3):
        lead.observe([1, 2, 9])
        lead.propose([], 3)
    assert lead.propose([], 3) == [1, 2, 3]


def test_a_later_source_continues_where_the_one_before_it_ends():
    lead = Lead([Says(4), Says(5, 6)])
    assert lead.propose([], 2) == [4, 6]
    lead.observe([5])
    assert lead.propose([], 2) == [5, 6]


def test_n_grams_go_on_from_the_text_or_from_what_is_drafted():
    pool = NgramPool()
    pool.extend([5, 6, 7, 8, 5])
    ngrams = Ngrams([5], pool, random.Random(0))
    assert ngrams.propose([5], [], 3) == [6, 7, 8]
    assert ngrams.propose([1], [6], 2) == [7, 8]
    assert ngrams.propose([1], [], 2) == []


def adapting(prompt: list[int], **config) -> DraftRule:
    """After a prompt and the first token, 1."""
    rule = DraftRule(JacobiConfig(**config), prompt, "seed")
    rule.begin(1)
    return rule


def test_what_may_be_tried_comes_in_order_of_its_chances():
    rule = adapting([1, 2, 3, 4, 1, 5, 6], draft_init="repeat", pool_size=4)
    chances = rule.outlook(99).hand
    assert chances == sorted(chances, reverse=True) and len(chances) > 5
    assert len(rule.propose(99, 0)) == 1, "nothing but the newest token"
    for guesses in range(1, len(chances) + 1):
        rule.outlook(99)
        assert len(rule.propose(99, guesses)) == 1 + guesses
    assert max(rule.draft.depths) <= 15


def test_the_newest_of_the_longest_matches_is_tried_before_what_matches_less():
    rule = adapting([7, 8, 1, 2, 3, 9, 1, 4, 7, 8], pool_size=4)
    rule.outlook(99)
    assert rule.propose(99, 1).tokens == [1, 2]


def test_what_is_copied_goes_round_where_the_text_repeats_itself():
    rule = adapting([1, 2, 3] * 4, pool_size=1)
    rule.outlook(99)
    draft = rule.propose(99, 15)
    assert [draft.tokens[node] for node in draft.path(draft.depths.index(max(draft.depths)))] == [1, 2, 3] * 5 + [1]


def test_own_predictions_that_come_true_are_tried_further():
    rule = adapting([9, 9], draft_init="repeat", pool_size=0)
    lengths, token = [], 1
    for _ in range(12):
        chances = rule.outlook(99).hand
        lengths.append(sum(chance > 0.2 for chance in chances))
        rule.propose(99, len(chances))
        rule.observe(
            [token + 1], [token + 1, *range(token + 2, token + 17)], [0], drafted=[0, *range(token + 2, token + 17)]
        )
        token += 1
    assert lengths == sorted(lengths) and lengths[0] < 4 and lengths[-1] == 15


def test_without_recycling_there_is_one_chain():
    rule = adapting([1, 2, 3] * 4, pool_size=0)
    for guesses in (1, 5, 15):
        rule.outlook(99)
        draft = rule.propose(99, guesses)
        assert len(draft) == draft.chain_length == 1 + guesses
    rule = adapting([5, 6, 7], pool_size=0)
    rule.outlook(99)
    assert len(rule.propose(99, 2)) == 3


def test_a_probe_tries_own_predictions():
    rule = adapting([1, 2, 3] * 4, draft_init="repeat", pool_size=4)
    rule.outlook(99)
    assert rule.propose(99, 3, probes=True).tokens == [1, 1, 1, 1]
    assert rule.propose(2, 3, probes=True).tokens == [1, 1], "never beyond the room"


def test_what_is_tried_stays_within_its_room():
    for room in (1, 2, 5):
        rule = adapting([1, 2, 3] * 4, pool_size=4)
        chances = rule.outlook(room).hand
        assert max(rule.propose(room, len(chances)).depths) <= room - 1


def test_branches_and_chain_that_begin_alike_share_their_tokens():
    tree = Tree([([1, 2, 3], [0.5, 0.4, 0.3]), ([1, 4], [0.8, 0.2]), ([5], [0.005])])
    assert tree.chances == [0.8, 0.4, 0.3, 0.2]
    assert [tree.cut(guesses) for guesses in range(5)] == [
        [[], [], []],
        [[1], [1], []],
        [[1, 2], [1], []],
        [[1, 2, 3], [1], []],
        [[1, 2, 3], [1, 4], []],
    ]


def table_of(entries: dict[tuple[int, ...], tuple[int, int]]) -> NgramTable:
    """A table from `{context: (token, level)}`."""
    keyed = sorted((key_of(context), *entry) for context, entry in entries.items())
    return NgramTable(*map(list, zip(*keyed)), order=max(map(len, entries)))


def rule_with(table: NgramTable, prompt: list[int], token: int, **config) -> DraftRule:
    rule = DraftRule(JacobiConfig(**config), prompt, "seed", table=table)
    rule.begin(token)
    return rule


def test_each_token_comes_from_the_table_or_from_earlier_text_whichever_is_likelier():
    table = table_of({(7,): (8, 15), (8,): (3, 1), (5, 6): (1, 15)})
    rule = rule_with(table, [2, 7, 8, 5, 6, 0, 4, 2], 7)
    outlook = rule.outlook(room=99, own=False)
    tokens, _ = rule.tree.ways[0]
    assert tokens[:4] == [8, 5, 6, 1], "7 8 by the table, then 5 6 by the text, then 1 by the table again"
    assert len(outlook.hand) >= 4 and list(outlook.hand) == sorted(outlook.hand, reverse=True)
    assert rule.propose(99, guesses=len(outlook.hand)).chain[:5] == [7, 8, 5, 6, 1]


def test_a_table_that_is_wrong_is_tried_less():
    table = table_of({(token,): (token + 50, 15) for token in range(40)})
    rule = rule_with(table, [99], 0)
    first = sum(rule.outlook(room=99, own=False).hand)
    for token in range(1, 30):
        rule.propose(99, guesses=0)
        rule.observe([token], [token], [0])
    assert sum(rule.outlook(room=99, own=False).hand) < 0.3 * first


def test_a_fixed_window_takes_candidates_and_first_guesses_from_the_table():
    table = table_of({(1,): (2, 9), (2,): (3, 9), (3,): (4, 9)})
    rule = rule_with(table, [9], 1, block_size=4)
    assert rule.propose(99).chain == [1, 2, 3, 4]
    rule = rule_with(table, [9], 1, block_size=4, draft_init="repeat", pool_size=1, ngram_size=2)
    assert rule.propose(99).tokens == [1, 1, 1, 1, 2, 3] and rule.candidates == [[2, 3]]
    rule = rule_with(table, [9], 1, block_size=4, draft_init="repeat", pool_size=0)
    assert rule.propose(99).tokens == [1, 1, 1, 1]
