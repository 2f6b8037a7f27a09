"""Drafts in the rows they are laid out in."""

from __future__ import annotations

import torch
from models import padded_prompts, tiny_model

from hf_jacobi.decoding.attention import AttentionMask
from hf_jacobi.decoding.compat import CACHE, cache_of
from hf_jacobi.decoding.drafting import Draft
from hf_jacobi.decoding.layout import lay_out
from hf_jacobi.decoding.slot_cache import SlotCache


def draft_of(chain, *branches) -> Draft:
    draft = Draft(list(chain))
    for branch in branches:
        draft.add_branch(list(branch))
    return draft


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
        step = lay_out(drafts, [12] * 3, [-amount for amount in padding], mask.bool(), torch.device("cpu"))
        cache.place(step.slots, 12, 12 + step.input_ids.shape[1])
        visible = AttentionMask(model.config, torch.float32, torch.tensor(padding))(
            step.visible, step.places, step.key_places
        )
        logits = model(step.input_ids, attention_mask=visible, position_ids=step.position_ids, **{CACHE: cache}).logits
        for row, draft in enumerate(drafts):
            for node in range(len(draft)):
                path = [draft.tokens[index] for index in draft.path(node)]
                plain = torch.cat([prompt[row, padding[row] :], torch.tensor(path)])[None]
                torch.testing.assert_close(logits[row, node], model(plain).logits[0, -1], atol=1e-5, rtol=1e-4)


def test_one_token_without_padding_needs_no_mask():
    step = lay_out([draft_of([1])], [12], [0], None, torch.device("cpu"))
    assert step.visible is None and step.position_ids.tolist() == [[12]] and step.uniform


def test_rows_at_different_lengths_write_different_slots():
    step = lay_out([draft_of([1, 2]), draft_of([3], [4])], [5, 9], [0, -2], None, torch.device("cpu"))
    assert not step.uniform
    assert step.slots.tolist() == [[5, 6], [9, 10]]
    assert step.position_ids.tolist() == [[5, 6], [7, 8]]
    assert step.visible[0].sum(1).tolist() == [6, 7] and step.visible[1].sum(1).tolist() == [10, 11]
