"""How far one model's predictions are from another's, as closed forms of their logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from router.precision.figures import Estimate

ROWS_AT_ONCE = 32  # 6 MB a matrix at a vocabulary of 49,152, so that it stays in the cache


@dataclass(frozen=True, slots=True)
class Distances:
    """One window, a value for each predicted token; all [num_tokens] float64.

    loss: -ln of the probability of the token that follows, of the model; reference_loss: of the reference. kl: the
    Kullback-Leibler divergence KL(reference || model) over the whole vocabulary, in nats. same_top1: 1 where both find
    the same token likeliest, else 0.
    """

    loss: torch.Tensor
    reference_loss: torch.Tensor
    kl: torch.Tensor
    same_top1: torch.Tensor


def distances(reference: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> Distances:
    """reference, logits: [num_tokens, vocab] float32 and finite, of the same rows. targets: [num_tokens] int64, the
    token that follows each.

    With logits x of the reference and y of the model, KL = sum p (x - y) - (ln Z_x - ln Z_y). Sums are in float64, so
    that rounding stays below 1e-7 nats; equal logits give exactly 0.
    """
    pieces = [torch.split(part, ROWS_AT_ONCE) for part in (reference, logits, targets)]
    compared = [_distances(*rows) for rows in zip(*pieces, strict=True)]
    return Distances(*(torch.cat(column) for column in zip(*compared, strict=True)))


def _distances(x: torch.Tensor, y: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
    weights_x, sum_x, log_z_x = _exponentials(x)
    _, _, log_z_y = _exponentials(y)
    kl = (weights_x * (x - y)).sum(-1, dtype=torch.float64) / sum_x - (log_z_x - log_z_y)
    at = targets[:, None]
    same = x.argmax(-1) == y.argmax(-1)
    return log_z_y - y.gather(1, at)[:, 0], log_z_x - x.gather(1, at)[:, 0], kl, same.double()


def _exponentials(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """exp(x - largest) [n, vocab] float32, its sum [n] and ln of the sum of exp(x) [n], both float64."""
    largest = x.amax(-1, keepdim=True)
    weights = (x - largest).exp()
    total = weights.sum(-1, dtype=torch.float64)
    return weights, total, total.log() + largest[:, 0]


def mean_over_windows(windows: torch.Tensor) -> Estimate:
    """windows: [num_windows, num_tokens]. The error is that of the windows' means, because tokens of one window are no
    independent draws."""
    means = windows.double().mean(1)
    error = float(means.std() / math.sqrt(len(means))) if len(means) > 1 else None
    return Estimate(float(means.mean()), error)


def perplexity(losses: torch.Tensor) -> float:
    """exp of the mean loss in nats: the vocabulary's size for a model that finds all tokens equally likely."""
    return math.exp(float(losses.double().mean()))


def perplexity_change(losses: torch.Tensor, reference_losses: torch.Tensor) -> Estimate:
    """perplexity(losses) / perplexity(reference_losses) - 1, both [num_windows, num_tokens].

    The error is of the paired differences, by the delta method: how hard the text is does not enter.
    """
    difference = mean_over_windows(losses - reference_losses)
    error = None if difference.error is None else math.exp(difference.value) * difference.error
    return Estimate(math.expm1(difference.value), error)


def share_of_other_choices(reference: torch.Tensor, choices: torch.Tensor) -> float | None:
    """Share of (layer, token) pairs whose set of chosen experts differs; None if there are no layers.

    Both [num_layers, num_tokens, k] int.
    """
    if not reference.numel():
        return None
    differ = reference.sort(-1).values != choices.sort(-1).values
    return float(differ.any(-1).double().mean())
