"""The losses of Jacobi Forcing: consistency of noisy blocks with the text, and AR on the text (paper, section 3.2)."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..decoding.errors import UsageError


LK_DECAY = 3.0  # eta, of the LK loss


def _soft(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return -(teacher.exp() * student).sum(-1)


def _kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return (teacher.exp() * (teacher - student)).sum(-1)


def _reverse_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return _kl(teacher, student)


def _jsd(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    mean = torch.logaddexp(student, teacher) - math.log(2.0)
    return (_kl(mean, student) + _kl(mean, teacher)) / 2


def _tv(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return (teacher.exp() - student.exp()).abs().sum(-1) / 2


def _lk(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    tv = _tv(student, teacher)
    weight = torch.exp(-LK_DECAY * (1 - tv.detach()))
    return weight * _kl(student, teacher) + (1 - weight) * tv


# Each maps log-probabilities `[N, V]` of student and teacher to `[N]`.
DIVERGENCES = {"soft": _soft, "kl": _kl, "reverse_kl": _reverse_kl, "jsd": _jsd, "tv": _tv, "lk": _lk}
OF_ACCEPTANCE = ("tv", "lk")  # not weighted by the squared temperature
CONSISTENCY_LOSSES = (*DIVERGENCES, "hard")


def consistency_loss(student: torch.Tensor, teacher: torch.Tensor, kind: str, temperature: float) -> torch.Tensor:
    """
    The distance of predictions made in noisy blocks from those made in the text.

    Args:
        student: `[N, V]` logits at noisy tokens, q.
        teacher: `[N, V]` logits at their twins, p; no gradient flows into them.
        kind: one of

            - `"soft"`: cross-entropy against the teacher's distribution, the paper's.
            - `"kl"`: the same less the teacher's entropy, so that 0 is perfect; the same gradient.
            - `"reverse_kl"`.
            - `"jsd"`: Jensen-Shannon.
            - `"tv"`: total variation, 1 - alpha, where alpha = sum of min(p, q) is the chance that a token drawn from
              q is accepted. Its gradient vanishes where q and p hardly overlap.
            - `"lk"`: the LK loss with adaptive lambda (Samarin et al., arXiv 2602.23881, sections 4.2 and 4.4),
              lambda KL + (1 - lambda) TV with lambda = exp(-3 alpha), which gets no gradient: KL while little is
              accepted, TV later. Alpha is that of each token; the authors' code takes the mean over a batch, so its
              micro-batches do not add up to one large batch.
            - `"hard"`: cross-entropy against the teacher's likeliest token; the temperature does not apply.
        temperature: T, which softens both distributions. The loss is multiplied by T squared, so that the size of the
            gradient does not depend on T (Hinton et al., arXiv 1503.02531, section 2); not for `"tv"` and `"lk"`, in
            which T is the temperature of sampling, and alpha a probability.

    Returns:
        `[N]`, float32; float64 for logits in float64.
    """
    if kind not in CONSISTENCY_LOSSES:
        raise UsageError(f"`consistency_loss` must be one of {CONSISTENCY_LOSSES}, got {kind!r}.")
    precision = torch.promote_types(student.dtype, torch.float32)
    student, teacher = student.to(precision), teacher.detach().to(precision)
    if kind == "hard":
        return F.cross_entropy(student, teacher.argmax(-1), reduction="none")
    if temperature != 1.0:
        student, teacher = student / temperature, teacher / temperature
    loss = DIVERGENCES[kind](F.log_softmax(student, -1), F.log_softmax(teacher, -1))
    return loss if kind in OF_ACCEPTANCE else loss * temperature**2


@dataclass
class Targets:
    """
    The tokens of a batch that the losses read, as indices into the flattened batch (`[B * L]`).

    Attributes:
        clean: `[N]`, tokens of the text whose next token has a label.
        labels: `[N]`, that next token.
        noisy: `[M]`, noisy tokens with a twin among `clean`, in the order of their twins.
        twins: `[M]`, the place of that twin in `clean`.
        blocks: `[M]`, the number of the noisy block, from 0.
        places: `[M]`, how many of `noisy` precede it in its block.
        present: `[B, L]`, true for tokens other than padding.
        host_twins: `twins` on the host.
        counts: the numbers of tokens of the AR loss, the consistency loss and the router loss.
    """

    clean: torch.Tensor
    labels: torch.Tensor
    noisy: torch.Tensor
    twins: torch.Tensor
    blocks: torch.Tensor
    places: torch.Tensor
    present: torch.Tensor
    host_twins: list[int]
    counts: list[int]

    def to(self, device: torch.device | str, **others) -> Targets:
        """The targets with their tensors on another device."""
        return self._map(lambda values: values.to(device, **others))

    def pin_memory(self) -> Targets:
        """The targets with their tensors in pinned memory."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Targets:
        return replace(
            self,
            clean=function(self.clean),
            labels=function(self.labels),
            noisy=function(self.noisy),
            twins=function(self.twins),
            blocks=function(self.blocks),
            places=function(self.places),
            present=function(self.present),
        )

    def chunks(self, size: int) -> Iterator[tuple[slice, slice]]:
        """Slices of `clean`, of `size` tokens each, with those of `noisy` whose twins they hold."""
        for start in range(0, len(self.clean), size):
            first, end = (bisect_left(self.host_twins, bound) for bound in (start, start + size))
            yield slice(start, start + size), slice(first, end)


def find_targets(batch: dict[str, Any], within_block: bool = False) -> Targets:
    """
    The tokens that the losses read. Both losses read only predictions of tokens in the text.

    Args:
        batch: collated rows, `[B, L]` each.
        within_block: omit the last token of each noisy block, which predicts the first token of the next block, as
            the authors' code does.
    """
    labels = torch.full_like(batch["labels"], -100)
    labels[:, :-1] = batch["labels"][:, 1:]
    following = torch.roll(batch["seq_ids"], -1, 1) == batch["seq_ids"]
    labels[~following | (batch["block_ids"] >= 0)] = -100

    length = labels.shape[1]
    flat_labels = labels.flatten()
    clean = (flat_labels != -100).nonzero().squeeze(1)
    place = torch.full_like(flat_labels, -1)
    place[clean] = torch.arange(len(clean), device=clean.device)

    twins = batch["twin_ids"]
    rows = torch.arange(twins.shape[0], device=twins.device).unsqueeze(1) * length
    twin_places = torch.where(twins >= 0, place[(rows + twins.clamp(min=0)).flatten()].view_as(twins), -1)
    if within_block:
        ends = torch.roll(_begins(batch), -1, 1)
        twin_places = twin_places.masked_fill(ends, -1)
    noisy = (twin_places.flatten() >= 0).nonzero().squeeze(1)
    twins = twin_places.flatten()[noisy]
    order = torch.argsort(twins, stable=True)
    blocks, places = _blocks_of(batch, noisy)
    present = batch["seq_ids"] >= 0
    counts = [len(clean), len(noisy), int(present.sum())]
    noisy, twins, blocks, places = (values[order] for values in (noisy, twins, blocks, places))
    return Targets(clean, flat_labels[clean], noisy, twins, blocks, places, present, twins.tolist(), counts)


def _begins(batch: dict[str, Any]) -> torch.Tensor:
    """`[B, L]`, true where a run of tokens of one block begins; each copy of a block is a run of its own."""
    begins = torch.ones_like(batch["seq_ids"], dtype=torch.bool)
    for column, step in (("seq_ids", 0), ("block_ids", 0), ("position_ids", 1)):
        begins[:, 1:] &= batch[column].diff(dim=1) == step
    begins[:, 1:] ^= True
    return begins


def _blocks_of(batch: dict[str, Any], noisy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The block number and the place in the block of noisy tokens `[M]`, given in the order of the batch."""
    numbers = _begins(batch).flatten().cumsum(0)[noisy]
    _, blocks, sizes = torch.unique_consecutive(numbers, return_inverse=True, return_counts=True)
    return blocks, torch.arange(len(noisy), device=noisy.device) - (sizes.cumsum(0) - sizes)[blocks]


def until_failure(right: torch.Tensor, targets: Targets) -> torch.Tensor:
    """
    The noisy tokens that count if a draft ends with its first failure: those of each block up to and including the
    first one whose prediction is wrong (Spec-AUF, arXiv 2607.01893).

    Args:
        right: `[M]` bool, whether the prediction at a noisy token is the text's next token.
        targets: the tokens.

    Returns:
        `[M]` bool.
    """
    never = len(right)
    wrong_places = torch.where(right, never, targets.places)
    first = torch.full_like(targets.places, never).scatter_reduce(0, targets.blocks, wrong_places, "amin")
    return targets.places <= first[targets.blocks]


class Terms(NamedTuple):
    """
    Sums over a batch. Divided by the counts of all micro-batches and processes, they make the loss of one large batch.
    A tuple, because wrappers such as FSDP search tuples for the tensors that gradients come from.

    Attributes:
        consistency, ar: sums of the two losses; scalars with a gradient.
        right: the number of noisy tokens whose prediction is the text's next token.
        router: the router loss of a mixture of experts, times its number of tokens; 0 without one.
        uncut: the consistency loss summed over all noisy tokens, each with a weight of 1; no gradient.
    """

    consistency: torch.Tensor
    ar: torch.Tensor
    right: torch.Tensor
    router: torch.Tensor | float = 0.0
    uncut: torch.Tensor | float = 0.0


class TokenLosses(torch.autograd.Function):
    """
    Losses of single tokens together with their gradients, for a head that is not trained.

    The loss of a token depends on its own hidden state alone, so its gradient needs no second computation of the
    logits: the backward pass multiplies it by the weight of the loss, which is not known before.
    """

    @staticmethod
    def forward(ctx, function, clean, noisy):
        """
        Args:
            function: maps `clean` and `noisy` to the losses `[N]` and `[M]`, and to a tensor without a gradient.
            clean, noisy: hidden states, `[N, H]` and `[M, H]`.
        """
        wanted = ctx.needs_input_grad[1:]
        with torch.enable_grad():
            inputs = [hidden.detach().requires_grad_(want) for hidden, want in zip((clean, noisy), wanted)]
            *losses, right = function(*inputs)
            gradients = [
                torch.autograd.grad(loss.sum(), hidden)[0] if want and len(hidden) else None
                for hidden, loss, want in zip(inputs, losses, wanted)
            ]
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(right)
        return *(loss.detach() for loss in losses), right

    @staticmethod
    def backward(ctx, of_clean, of_noisy, _):
        weighted = [
            None if gradient is None else (gradient * weight.unsqueeze(1)).to(gradient.dtype)
            for gradient, weight in zip(ctx.saved_tensors, (of_clean, of_noisy))  # float16: the weights are scaled
        ]
        return None, *weighted


def sum_losses(
    head: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    targets: Targets,
    *,
    kind: str = "soft",
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    chunk_size: int = 512,
    accept_cut: bool = False,
    place_weight: float = 1.0,
    trained_head: bool = True,
    text_learns: bool = True,
) -> Terms:
    """
    The sums of both losses, with the logits of one chunk of tokens in memory at a time.

    The logits of a chunk are dropped once they are summed. A head that is trained computes them again in the backward
    pass; any other has the gradients of the hidden states by then.

    Args:
        head: maps hidden states `[N, H]` to logits `[N, V]`.
        hidden: `[B, L, H]`, the hidden states that the head reads.
        targets: the tokens that the losses read.
        kind, temperature: see `consistency_loss`.
        label_smoothing: of the AR loss.
        chunk_size: the number of text tokens in a chunk, to which their noisy twins are added.
        accept_cut: see `until_failure`.
        place_weight: the weight of each place of a block relative to the one before it.
        trained_head: whether the weights of the head get a gradient.
        text_learns: whether the AR loss has a gradient.
    """
    flat = hidden.flatten(0, 1)
    # With a gradient, so that processes whose batch has no targets stay in step.
    zero = flat.new_zeros((), dtype=torch.float32) + 0.0 * flat[:1].float().sum()

    def chunk_losses(labels, places, clean_hidden, noisy_hidden):
        logits = head(clean_hidden)
        ar = F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=label_smoothing)
        student = head(noisy_hidden)
        right = student.detach().argmax(-1) == labels[places]
        return ar, consistency_loss(student, logits[places], kind, temperature), right

    ar, losses, rights = zero, [zero.new_zeros(0)], [torch.zeros(0, dtype=torch.bool, device=flat.device)]
    for chunk, some in targets.chunks(chunk_size):
        function = partial(chunk_losses, targets.labels[chunk], targets.twins[some] - chunk.start)
        text_hidden = flat[targets.clean[chunk]]
        inputs = text_hidden if text_learns else text_hidden.detach(), flat[targets.noisy[some]]
        if not torch.is_grad_enabled():
            text, drafts, right = function(*inputs)
        elif trained_head:
            text, drafts, right = checkpoint(function, *inputs, use_reentrant=False)
        else:
            text, drafts, right = TokenLosses.apply(function, *inputs)
        ar = ar + text.sum()
        losses.append(drafts)
        rights.append(right)
    # A block can lie in several chunks, so its cut is known only now.
    loss, right = torch.cat(losses), torch.cat(rights)
    weights = place_weight**targets.places if place_weight != 1.0 else torch.ones_like(loss)
    if accept_cut:
        weights = weights * until_failure(right, targets)
    return Terms(zero + (loss * weights).sum(), ar, right.sum().float(), uncut=loss.detach().sum())
