"""Losses compared with loops in plain Python, and their memory."""

import math

import pytest
import torch
from models import tiny_model
from packed_rows import packed

from hf_jacobi.training.collator import PackedCollator
from hf_jacobi.training.forward import Head
from hf_jacobi.training.losses import (
    CONSISTENCY_LOSSES,
    consistency_loss,
    find_targets,
    sum_losses,
    until_failure,
)
from hf_jacobi.trajectories.samples import join_samples, lay_out_sample


def softmax(values, temperature=1.0):
    weights = [math.exp(value / temperature) for value in values]
    return [weight / sum(weights) for weight in weights]


def by_hand(kind, student, teacher, temperature):
    if kind == "hard":
        return -math.log(softmax(student)[teacher.index(max(teacher))])
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    mean = [(a + b) / 2 for a, b in zip(p, q)]
    kl = lambda x, y: sum(a * math.log(a / b) for a, b in zip(x, y))  # noqa: E731
    values = {
        "soft": -sum(a * math.log(b) for a, b in zip(p, q)),
        "kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "jsd": (kl(p, mean) + kl(q, mean)) / 2,
    }
    alpha = sum(map(min, p, q))
    weight = math.exp(-3 * alpha)
    unweighted = {"tv": 1 - alpha, "lk": weight * kl(p, q) + (1 - weight) * (1 - alpha)}
    return unweighted[kind] if kind in unweighted else values[kind] * temperature**2


@pytest.mark.parametrize("kind", CONSISTENCY_LOSSES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_consistency_losses(kind, temperature):
    student, teacher = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    losses = consistency_loss(student, teacher, kind, temperature)
    for loss, one, other in zip(losses, student.tolist(), teacher.tolist()):
        assert float(loss) == pytest.approx(by_hand(kind, one, other, temperature), rel=1e-5)


@pytest.mark.parametrize("kind", CONSISTENCY_LOSSES)
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_gradients_are_those_of_small_differences(kind, temperature):
    """In float64. The LK loss treats its weight as a constant, so the comparison holds that weight fixed."""
    student, teacher = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    student.requires_grad_()
    (ours,) = torch.autograd.grad(consistency_loss(student, teacher, kind, temperature).sum(), student)
    held = None
    if kind == "lk":
        tv = consistency_loss(student.detach(), teacher, "tv", temperature)
        held = torch.exp(-3 * (1 - tv))

    def value(logits):
        if held is None:
            return float(consistency_loss(logits, teacher, kind, temperature).sum())
        kl = consistency_loss(logits, teacher, "kl", temperature) / temperature**2
        return float((held * kl + (1 - held) * consistency_loss(logits, teacher, "tv", temperature)).sum())

    for row, column in ((row, column) for row in range(3) for column in range(7)):
        step = torch.zeros_like(teacher)
        step[row, column] = 1e-6
        slope = (value(student.detach() + step) - value(student.detach() - step)) / 2e-6
        assert float(ours[row, column]) == pytest.approx(slope, abs=1e-7)


@pytest.mark.parametrize("kind", CONSISTENCY_LOSSES)
@pytest.mark.parametrize("apart", [0.0, 1e2, 3e38], ids=["equal", "disjoint", "at the end of bfloat16"])
def test_losses_and_gradients_of_bfloat16_are_finite(kind, apart):
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(4, 9, generator=generator).to(torch.bfloat16)
    student = teacher.clone()
    teacher[:, 0] += apart
    student[:, 1] += apart
    student.requires_grad_()
    loss = consistency_loss(student, teacher, kind, 1.0)
    loss.sum().backward()
    assert loss.isfinite().all() and student.grad.isfinite().all()
    if apart == 0.0 and kind not in ("soft", "hard"):
        assert float(loss.detach().abs().max()) < 1e-6
    if kind == "tv" and apart:
        assert loss.tolist() == pytest.approx([1.0] * 4)
    if kind == "lk" and apart:
        assert float(student.grad.abs().max()) > 0.1, "KL teaches where nothing is accepted"


def test_total_variation_is_what_is_not_accepted():
    """For a token drawn from the student and accepted with probability min(1, p / q)."""
    student, teacher = torch.randn(2, 1, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q, p = student.softmax(-1), teacher.softmax(-1)
    accepted = (q * (p / q).clamp(max=1)).sum()
    assert float(consistency_loss(student, teacher, "tv", 1.0)) == pytest.approx(1 - float(accepted))


def test_no_gradient_flows_into_the_teacher():
    student, teacher = (torch.randn(3, 5, requires_grad=True) for _ in range(2))
    consistency_loss(student, teacher, "soft", 1.0).sum().backward()
    assert student.grad is not None and teacher.grad is None


@pytest.mark.parametrize("max_length", [None, 100])
@pytest.mark.parametrize("within_block", [False, True])
def test_targets_are_those_of_a_plain_loop(max_length, within_block):
    rows = packed(5, max_length=max_length)
    batch = PackedCollator(0)(rows)
    targets = find_targets(batch, within_block)
    clean, noisy = [], []
    length = batch["input_ids"].shape[1]
    for number, row in enumerate(rows):
        shift = number * length + length - len(row["input_ids"])
        for index in range(len(row["input_ids"])):
            following = index + 1 < len(row["input_ids"]) and row["seq_ids"][index + 1] == row["seq_ids"][index]
            if row["block_ids"][index] < 0 and following and row["labels"][index + 1] != -100:
                clean.append((shift + index, row["labels"][index + 1]))
        known = {index for index, _ in clean}
        for index, twin in enumerate(row["twin_ids"]):
            inside = index + 1 < len(row["input_ids"]) and (
                (row["seq_ids"][index + 1], row["block_ids"][index + 1])
                == (row["seq_ids"][index], row["block_ids"][index])
            )
            if twin >= 0 and shift + twin in known and (inside or not within_block):
                noisy.append((shift + index, shift + twin))
    assert list(zip(targets.clean.tolist(), targets.labels.tolist())) == clean
    assert sorted(zip(targets.noisy.tolist(), targets.clean[targets.twins].tolist())) == noisy
    assert targets.twins.tolist() == sorted(targets.twins.tolist()) == targets.host_twins
    assert targets.counts == [len(clean), len(noisy), sum(len(row["input_ids"]) for row in rows)]
    assert 0 < len(noisy) < len(clean)


def blocks_of(batch, targets) -> list[list[int]]:
    """For each noisy block of a batch, the places of its tokens in `targets.noisy`, found token by token."""
    keys = {}
    flat = {name: batch[name].flatten().tolist() for name in ("seq_ids", "block_ids", "position_ids")}
    length = batch["input_ids"].shape[1]
    where = {token: number for number, token in enumerate(targets.noisy.tolist())}
    for token in sorted(where):
        key = (token // length, flat["seq_ids"][token], flat["block_ids"][token])
        keys.setdefault(key, []).append(where[token])
    return list(keys.values())


@pytest.mark.parametrize("max_length", [None, 100])
def test_only_positions_up_to_the_first_failure_count(max_length):
    batch = PackedCollator(0)(packed(6, max_length=max_length))
    targets = find_targets(batch)
    right = torch.rand(len(targets.noisy), generator=torch.Generator().manual_seed(0)) < 0.6
    expected, places = [False] * len(right), [0] * len(right)
    for block in blocks_of(batch, targets):
        for place, number in enumerate(block):
            expected[number], places[number] = True, place
            if not right[number]:
                break
        for place, number in enumerate(block):
            places[number] = place
    assert targets.places.tolist() == places
    assert until_failure(right, targets).tolist() == expected
    assert 0 < sum(expected) < len(expected)
    assert until_failure(torch.ones_like(right), targets).all()
    assert until_failure(torch.zeros_like(right), targets).tolist() == [place == 0 for place in places]


def test_copies_of_a_block_side_by_side_are_blocks_of_their_own():
    """Although they have the same number: the positions start again."""
    row = {
        "input_ids": [5, 6, 7, 8, 7, 9, 7, 9],
        "position_ids": [0, 1, 2, 3, 2, 3, 2, 3],
        "block_ids": [-1, -1, -1, -1, 0, 0, 0, 0],
        "window_start": [0, 0, 0, 0, 1, 1, 1, 1],
        "labels": [-100, 6, 7, 8, -100, -100, -100, -100],
        "seq_ids": [0] * 8,
        "twin_ids": [-1, -1, -1, -1, 1, 2, 1, 2],
    }
    targets = find_targets(PackedCollator(0)([row]))
    assert targets.noisy.tolist() == [4, 6, 5, 7], "in the order of their twins"
    assert targets.blocks.tolist() == [0, 1, 0, 1] and targets.places.tolist() == [0, 0, 1, 1]
    right = torch.tensor([False, True, True, True])
    assert until_failure(right, targets).tolist() == [True, True, False, True]


@pytest.mark.parametrize("kind", CONSISTENCY_LOSSES)
@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
@pytest.mark.parametrize("settings", [{"accept_cut": True}, {"accept_cut": True, "place_weight": 0.5}])
def test_a_cut_is_the_same_wherever_chunks_end(kind, chunk_size, settings):
    """Also in blocks: a chunk of one token cuts every block. Compared with a loop over the blocks."""
    batch = PackedCollator(0)(packed(4))
    targets = find_targets(batch)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(*batch["input_ids"].shape, 16, generator=generator, requires_grad=True)
    head = torch.nn.Linear(16, 96)
    weight = torch.randn(96, 16, generator=generator)
    with torch.no_grad():  # some predictions must be correct
        head.weight.copy_(weight)
        some = targets.noisy[torch.rand(len(targets.noisy), generator=generator) < 0.6]
        hidden.flatten(0, 1)[some] = weight[batch_labels(targets, some)]
    terms = sum_losses(head, hidden, targets, kind=kind, chunk_size=chunk_size, **settings)
    (terms.consistency + terms.ar).backward()
    gradients = hidden.grad.clone(), head.weight.grad.clone()
    hidden.grad = head.weight.grad = None

    logits = head(hidden.flatten(0, 1))
    labels = targets.labels[targets.twins]
    student, teacher = logits[targets.noisy], logits[targets.clean[targets.twins]]
    losses = consistency_loss(student, teacher, kind, 1.0)
    right = (student.argmax(-1) == labels).tolist()
    expected, counted = 0.0, 0
    for block in blocks_of(batch, targets):
        for place, number in enumerate(block):
            expected = expected + losses[number] * settings.get("place_weight", 1.0) ** place
            counted += 1
            if not right[number]:
                break
    assert 0 < counted < len(losses) and counted > len(blocks_of(batch, targets))
    ar = torch.nn.functional.cross_entropy(logits[targets.clean], targets.labels, reduction="sum")
    (expected + ar).backward()
    assert float(terms.consistency.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert float(terms.uncut) == pytest.approx(float(losses.detach().sum()), rel=1e-5), "what is logged is of all"
    assert int(terms.right) == sum(right)
    for ours, theirs in zip(gradients, (hidden.grad, head.weight.grad)):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def batch_labels(targets, some):
    """The next tokens of the text, at some of the noisy tokens."""
    labels = dict(zip(targets.noisy.tolist(), targets.labels[targets.twins].tolist()))
    return torch.tensor([labels[token] for token in some.tolist()])


def straightforward(head, hidden, targets, temperature=1.0):
    logits = head(hidden.flatten(0, 1))
    ar = torch.nn.functional.cross_entropy(logits[targets.clean], targets.labels, reduction="sum")
    teacher = logits[targets.clean[targets.twins]]
    return consistency_loss(logits[targets.noisy], teacher, "soft", temperature).sum(), ar


@pytest.mark.parametrize("trained_head", [True, False])
@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_chunks_change_nothing(chunk_size, trained_head):
    batch = PackedCollator(0)(packed(4))
    targets = find_targets(batch)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(*batch["input_ids"].shape, 16, generator=generator, requires_grad=True)
    head = torch.nn.Linear(16, 96).requires_grad_(trained_head)
    terms = sum_losses(head, hidden, targets, temperature=2.0, chunk_size=chunk_size, trained_head=trained_head)
    (terms.consistency + 3 * terms.ar).backward()
    gradients = [tensor.grad.clone() for tensor in (hidden, head.weight) if tensor.requires_grad]
    hidden.grad = head.weight.grad = None
    consistency, ar = straightforward(head, hidden, targets, temperature=2.0)
    (consistency + 3 * ar).backward()
    assert float(terms.consistency.detach()) == pytest.approx(float(consistency.detach()), rel=1e-5)
    assert float(terms.ar.detach()) == pytest.approx(float(ar.detach()), rel=1e-5)
    for ours, theirs in zip(gradients, (hidden.grad, head.weight.grad)):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    labels = targets.labels[targets.twins]
    assert int(terms.right) == int((head(hidden.flatten(0, 1))[targets.noisy].argmax(-1) == labels).sum())


def test_a_batch_without_targets_has_a_gradient_of_zero():
    batch = {name: values.clone() for name, values in PackedCollator(0)(packed(1)).items()}
    batch["labels"].fill_(-100)
    hidden = torch.randn(*batch["input_ids"].shape, 4, requires_grad=True)
    terms = sum_losses(torch.nn.Linear(4, 96), hidden, find_targets(batch))
    (terms.consistency + terms.ar).backward()
    assert float(terms.ar) == 0 and float(hidden.grad.abs().max()) == 0


def test_within_a_block_ends_where_another_copy_begins_with_the_same_block():
    """Blocks without a wrong token vanish from drafts, so copies of one block can follow each other."""
    text = list(range(10, 22))
    copy = [text[:4], [text[4], 50, 50, 50], text[8:]]
    row = join_samples([lay_out_sample([3, 4], text, [copy, copy, copy], 1)])
    batch = PackedCollator(0, as_drafts=True)([row])
    assert find_targets(batch).counts[1] == 9
    assert find_targets(batch, within_block=True).counts[1] == 6


def test_a_head_whose_weights_are_hidden_counts_as_trained():
    """FSDP 1 replaces parameters by plain tensors in its forward."""
    model = tiny_model()
    head = Head(model)
    assert head.is_trained
    model.get_output_embeddings().requires_grad_(False)
    assert not head.is_trained
    weight = model.lm_head._parameters.pop("weight")
    model.lm_head.weight = weight.data
    assert head.is_trained
