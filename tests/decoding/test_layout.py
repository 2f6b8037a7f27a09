"""Drafts laid out in the rows of a forward."""

from __future__ import annotations

import torch
from models import padded_prompts, tiny_model

from hf_jacobi.decoding.attention import AttentionMask
from hf_jacobi.decoding.compat import CACHE, cache_of
from hf_jacobi.decoding.drafting import Draft
from hf_jacobi.decoding.layout import Layout
from hf_jacobi.decoding.slot_cache import SlotCache


def draft_of(chain, *branches) -> Draft:
    draft = Draft(list(chain))
    for branch in branches:
        draft.add_branch(list(branch))
    return draft


def lay_out(drafts, starts, offsets) -> Layout:
    layout = Layout(len(drafts), max(map(len, drafts)), 0, torch.device("cpu"))
    layout.fill(drafts, starts, offsets)
    layout.upload()
    return layout


def test_a_draft_scores_each_path_as_a_plain_forward_would():
    # The slow oracle: one causal forward for every node, over the prompt and the node's own path.
    torch.manual_seed(0)
    model, inputs = tiny_model("mistral-window"), padded_prompts(3)
    prompt, mask = inputs["input_ids"], inputs["attention_mask"]
    drafts = [draft_of([5, 6, 7, 8], [6, 9, 10], [11]), draft_of([4, 3]), draft_of([9], [7, 7, 7, 7, 7, 7])]
    padding = (mask == 0).sum(1).tolist()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        home = cache_of(model(prompt, attention_mask=mask, position_ids=positions, use_cache=True))
        cache = SlotCache.from_prefill(home, 12, keep=False)
        step = lay_out(drafts, [12] * 3, [-amount for amount in padding])
        cache.place(step.slots, 12, step.end)
        slots = torch.arange(step.end)
        visible = AttentionMask(model.config, torch.float32, torch.tensor(padding))(
            step.visible(slots, mask.bool()), step.places, step.key_places(slots)
        )
        logits = model(step.ids, attention_mask=visible, position_ids=step.positions, **{CACHE: cache}).logits
        for row, draft in enumerate(drafts):
            for node in range(len(draft)):
                path = [draft.tokens[index] for index in draft.path(node)]
                plain = torch.cat([prompt[row, padding[row] :], torch.tensor(path)])[None]
                torch.testing.assert_close(logits[row, node], model(plain).logits[0, -1], atol=1e-5, rtol=1e-4)


def test_one_token_without_padding_needs_no_mask():
    step = lay_out([draft_of([1])], [12], [0])
    assert step.visible(torch.arange(13), None) is None
    assert step.positions.tolist() == [[12]] and step.first == 12 and step.end == 13


def test_rows_at_different_lengths_write_different_slots():
    step = lay_out([draft_of([1, 2]), draft_of([3], [4])], [5, 9], [0, -2])
    assert step.first is None and step.end == 11
    assert step.slots.tolist() == [[5, 6], [9, 10]]
    assert step.positions.tolist() == [[5, 6], [7, 8]]
    visible = step.visible(torch.arange(11), None)
    assert visible[0].sum(1).tolist() == [6, 7] and visible[1].sum(1).tolist() == [10, 11]


def test_branches_share_places():
    step = lay_out([draft_of([1, 2, 3], [4, 5], [6])], [10], [-3])
    assert step.places.tolist() == [[10, 11, 12, 11, 12, 11]]
    assert step.positions.tolist() == [[7, 8, 9, 8, 9, 8]]
    assert step.key_places(torch.arange(16)).tolist() == [[*range(10), 10, 11, 12, 11, 12, 11]]
    sees = [[node for node in range(6) if row[node]] for row in step.ancestors[0].tolist()]
    assert sees == [[0], [0, 1], [0, 1, 2], [0, 3], [0, 3, 4], [0, 5]]


def test_copies_of_the_chain_see_themselves_and_the_text():
    layout = Layout(1, 5, 0, torch.device("cpu"))
    layout.fill([draft_of([1, 2], [3])], [10], [0], copies=2)
    assert layout.ids.tolist() == [[1, 2, 3, 1, 2]]
    assert layout.places.tolist() == [[10, 11, 11, 10, 11]]
    assert layout.ancestors[0, 3:].tolist() == [[False] * 3 + [True, False], [False] * 3 + [True, True]]


def test_a_layout_can_be_filled_again():
    layout = Layout(2, 3, 0, torch.device("cpu"))
    layout.fill([draft_of([1, 2, 3]), draft_of([4], [5, 6])], [4, 6], [0, 0])
    layout.fill([draft_of([7]), draft_of([8, 9])], [5, 8], [0, -1])
    fresh = Layout(2, 3, 0, torch.device("cpu"))
    fresh.fill([draft_of([7]), draft_of([8, 9])], [5, 8], [0, -1])
    for name in ("ids", "positions", "slots", "places", "starts", "ancestors"):
        assert torch.equal(getattr(layout, name), getattr(fresh, name)), name


def test_a_default_device_of_torchs_is_not_where_the_host_writes():
    with torch.device("meta"):
        layout = Layout(1, 2, 1, torch.device("meta"))
        layout.fill([Draft([5, 6])], [3], [0])
        layout.upload()
    assert layout.host["slots"].tolist() == [[3, 4]] and layout.slots.device.type == "meta"
