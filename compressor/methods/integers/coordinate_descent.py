"""Adaptive rounding by coordinate descent: codes that are there move, one after the other, to what
is best beside all others.

References: the step is the closed-form one of QuantEase (arXiv 2309.01885); what is minimised, the
error of the layer's output, is that of AdaRound (arXiv 2004.10568), which MLoRQ (arXiv 2507.09616)
ends with, by gradients of a relaxed problem on tokens.

Glossary
    metric  tr(H D M Dᵀ), D = W − Ŵ      pull R = H D M (out, in), minus half the gradient in Ŵ
    step    entry (i, j) alone has its best value at ŵ + R_ij / (H_ii M_jj), so the best code is the
            nearest to that: nothing is trained

Where H is the identity outputs do not see each other and a column moves at once. Otherwise all of a
column's steps together may be too much; of all of them, those of more than half of the largest
gain, and the best one alone, a column takes what gains most. So no step raises the error. Feedback
works in one pass and cannot return to a code; this can, and starts where feedback ends.
"""

import torch
from torch import Tensor

from compressor.linalg import Metric
from compressor.methods.integers.error_feedback import Entries, nearest

TINY = torch.finfo(torch.float64).tiny


def descend(
    weight: Tensor,
    codes: Tensor,
    entries: Entries,
    metric: Metric,
    root: Tensor | None,
    sweeps: int,
    block: int,
) -> Tensor:
    """Codes (K, out, in) of no larger error than those that come, after some sweeps over all
    inputs; fewer if nothing moves any more.

    weight: (out, in) float64; metric: M, a Gram and not its diagonal; root: L (out, out) with L Lᵀ
    = H, or None.
    """
    width = weight.shape[1]
    moment = metric.weigh(torch.eye(width, dtype=torch.float64, device=weight.device))
    outer = None if root is None else root @ root.T
    values = entries.scales * (codes - entries.zeros)
    codes, pull = codes.clone(), weigh_lost(weight - values, moment, outer)
    for _ in range(sweeps):
        before = codes.clone()
        for start in range(0, width, block):
            columns = slice(start, min(start + block, width))
            moved = torch.zeros_like(pull[..., columns])  # H times the steps of these inputs
            for column in range(columns.start, columns.stop):
                scales, zeros = entries.scales[..., column], entries.zeros[..., column]
                now = scales * (codes[..., column] - zeros)
                here = (
                    pull[..., column] - moved[..., : column - start] @ moment[start:column, column]
                )
                chosen, step = best_column(
                    here, now, scales, zeros, entries.halves, moment[column, column], outer
                )
                codes[..., column] = torch.where(step != 0, chosen, codes[..., column])
                moved[..., column - start] = step if outer is None else step @ outer
            pull -= moved @ moment[columns]
        if torch.equal(codes, before):
            break
    return codes


def weigh_lost(lost: Tensor, moment: Tensor, outer: Tensor | None) -> Tensor:
    """Weigh D (K, out, in): H D M."""
    return lost @ moment if outer is None else outer @ (lost @ moment)


def best_column(
    pull: Tensor,
    now: Tensor,
    scales: Tensor,
    zeros: Tensor,
    halves: Tensor,
    moment: Tensor,
    outer: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Codes that entries (K, out) of one input move to, and the steps of their values, 0 where they
    stay. moment: M_jj.
    """
    curvature = (moment if outer is None else moment * outer.diagonal()).clamp(min=TINY)
    codes = nearest(now + pull / curvature, scales, zeros, halves)
    step = scales * (codes - zeros) - now
    gains = step * (2 * pull - curvature * step)
    step = torch.where(gains > 0, step, 0.0)
    if outer is None:
        return codes, step
    gains = gains.clamp(min=0)
    largest = gains.amax(1, keepdim=True)
    single = torch.zeros_like(step).scatter(1, gains.argmax(1, keepdim=True), 1.0)
    offers = torch.stack([step, step * (2 * gains > largest), step * single])  # (3, K, out)
    joint = (offers * (2 * pull - moment * (offers @ outer))).sum(2)
    taken = joint.argmax(0)[None, :, None].expand(1, *step.shape)
    return codes, offers.gather(0, taken)[0]
