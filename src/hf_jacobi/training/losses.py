"""The losses of Jacobi Forcing: consistency of noisy blocks with the text, and the text (paper, section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

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


# From log-probabilities `[N, V]` of student and teacher to `[N]`.
DIVERGENCES = {"soft": _soft, "kl": _kl, "reverse_kl": _reverse_kl, "jsd": _jsd, "tv": _tv, "lk": _lk}
OF_ACCEPTANCE = ("tv", "lk")  # not weighted by the temperature
CONSISTENCY_LOSSES = (*DIVERGENCES, "hard")


def consistency_loss(student: torch.Tensor, teacher: torch.Tensor, kind: str, temperature: float) -> torch.Tensor:
    """
    How far predictions made in a noisy block are from those made in the text.

    Args:
        student: `[N, V]` logits at noisy tokens, q.
        teacher: `[N, V]` logits at their twins, p; no gradient flows into them.
        kind: one of

            - `"soft"`: cross-entropy against the teacher's distribution, the paper's.
            - `"kl"`: the same less the teacher's entropy, so that 0 is perfect; the same gradient.
            - `"reverse_kl"`.
            - `"jsd"`: Jensen-Shannon.
            - `"tv"`: total variation, 1 - alpha, where alpha = sum of min(p, q) is the chance that a token drawn from
              q is accepted. Its gradient vanishes where q and p have hardly anything in common.
            - `"lk"`: the LK loss with adaptive lambda (Samarin et al., arXiv 2602.23881, sections 4.2 and 4.4),
              lambda KL + (1 - lambda) TV with lambda = exp(-3 alpha), which gets no gradient: KL as long as little is
              accepted, TV later. Alpha is that of each token; the authors' code takes the mean over a batch, with
              which micro-batches would no longer add up to one large batch.
            - `"hard"`: cross-entropy against the teacher's likeliest token; the temperature does not apply.
        temperature: T, by which both distributions are softened. The loss is weighted by its square, so that the size
            of the gradient does not depend on it (Hinton et al., arXiv 1503.02531, section 2); but for `"tv"` and
            `"lk"`, in which T is the temperature that tokens are drawn at, and alpha a probability.

    Returns:
        `[N]`, float32; float64 for logits in float64.
    """
    if kind not in CONSISTENCY_LOSSES:
        raise UsageError(f"`consistency_loss` must be one of {CONSISTENCY_LOSSES}, got {kind!r}.")
    precision = torch.promote_types(student.dtype, torch.float32)
    student, teacher = student.to(precision), teacher.detach().to(precision)
    if kind == "hard":
        return F.cross_entropy(student, teacher.argmax(-1), reduction="none")
    loss = DIVERGENCES[kind](F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1))
    return loss if kind in OF_ACCEPTANCE else loss * temperature**2


@dataclass
class Targets:
    """
    Which tokens of a batch the losses read, as indices into the batch laid out flat (`[B * L]`).

    Attributes:
        clean: `[N]`, tokens of the text whose following token has a label.
        labels: `[N]`, that following token.
        noisy: `[M]`, noisy tokens with a twin among `clean`.
        twins: `[M]`, the place in `clean` of that twin.
        present: `[B, L]`, tokens that are no padding.
    """

    clean: torch.Tensor
    labels: torch.Tensor
    noisy: torch.Tensor
    twins: torch.Tensor
    present: torch.Tensor

    @property
    def counts(self) -> torch.Tensor:
        """`[3]`: tokens of the AR loss, of the consistency loss, and of the router loss of a mixture of experts."""
        counts = [len(self.clean), len(self.noisy), self.present.sum()]
        return torch.tensor(counts, device=self.clean.device)


def find_targets(batch: dict[str, torch.Tensor], within_block: bool = False) -> Targets:
    """
    The tokens that the losses read. Both read predictions of tokens that the text has: what would follow its end is
    not known.

    Args:
        batch: collated rows, `[B, L]` each.
        within_block: leave out the last token of each noisy block, which predicts the first token of the next one, as
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
        ends = (torch.roll(batch["block_ids"], -1, 1) != batch["block_ids"]) | ~following
        ends[:, -1] = True
        twin_places = twin_places.masked_fill(ends, -1)
    noisy = (twin_places.flatten() >= 0).nonzero().squeeze(1)
    return Targets(clean, flat_labels[clean], noisy, twin_places.flatten()[noisy], batch["seq_ids"] >= 0)


class Terms(NamedTuple):
    """
    Sums over a batch. Divided by counts over all micro-batches and processes, they make the loss of one large batch.
    A tuple, in which wrappers such as FSDP find the tensors that gradients come from.

    Attributes:
        consistency, ar: sums of the two losses; scalars with a gradient.
        right: noisy tokens whose prediction is the text's next token.
        router: the router loss of a mixture of experts, times the tokens it is of; 0 without one.
    """

    consistency: torch.Tensor
    ar: torch.Tensor
    right: torch.Tensor
    router: torch.Tensor | float = 0.0


def sum_losses(
    head: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    targets: Targets,
    *,
    kind: str = "soft",
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    chunk_size: int = 512,
) -> Terms:
    """
    The sums of both losses, with the logits of `chunk_size` tokens in memory at a time.

    A chunk's logits are dropped after it has been summed and made again in the backward pass.

    Args:
        head: from hidden states `[N, H]` to logits `[N, V]`.
        hidden: `[B, L, H]`, the hidden states that the head reads.
        targets: which of them are read.
        kind, temperature: see `consistency_loss`.
        label_smoothing: of the AR loss.
        chunk_size: tokens of the text whose logits, and those of their noisy twins, are held at a time.
    """
    flat = hidden.flatten(0, 1)
    order = torch.argsort(targets.twins)
    noisy, twins = targets.noisy[order], targets.twins[order]
    zero = (
        flat.new_zeros((), dtype=torch.float32) + 0.0 * flat[:1].float().sum()
    )  # keeps a batch of no targets in step
    terms = [zero, zero.clone(), zero.detach().clone()]

    def chunk_sums(clean_hidden, noisy_hidden, labels, places):
        logits = head(clean_hidden)
        ar = F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=label_smoothing)
        student = head(noisy_hidden)
        consistency = consistency_loss(student, logits[places], kind, temperature).sum()
        right = (student.detach().argmax(-1) == labels[places]).sum().float()
        return consistency, ar, right

    bounds = torch.searchsorted(
        twins, torch.arange(0, len(targets.clean) + chunk_size, chunk_size, device=twins.device)
    )
    for number, start in enumerate(range(0, len(targets.clean), chunk_size)):
        some = slice(int(bounds[number]), int(bounds[number + 1]))
        chunk = targets.clean[start : start + chunk_size]
        inputs = (flat[chunk], flat[noisy[some]], targets.labels[start : start + chunk_size], twins[some] - start)
        if torch.is_grad_enabled():
            sums = checkpoint(chunk_sums, *inputs, use_reentrant=False)
        else:
            sums = chunk_sums(*inputs)
        terms = [total + part for total, part in zip(terms, sums)]
    return Terms(*terms)
