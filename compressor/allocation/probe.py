"""Measure what truncating one linear does to the model's output: KL(original‖probed) on held-out
windows, one linear at a time.

Reference: LEMS (ICML 2026). One measured divergence gives the scale of a linear's damage, its error
curve the shape: damage(size) = KL(probe) · error(size) / error(probe).

Differs from the authors' code: the original's block outputs are cached once, so that a probe costs
only the blocks behind its linear.

Memory: the original's block outputs and final hidden states on all windows, probabilities of at
most KNOWN_BYTES, and a few times the logits of one chunk of positions (`models.head`), whatever the
vocabulary. Probabilities beyond KNOWN_BYTES are computed again from the hidden states in each
probe, which costs one more product with the head.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compressor.allocation.decompose import Decomposition
from compressor.errors import NumericalError
from compressor.models.head import Head, row_blocks
from compressor.models.install import installed
from compressor.models.partial_forward import input_device
from compressor.models.restart import Restart
from compressor.plan import Candidate, Curve

KNOWN_BYTES = 1 << 30  # of the original's probabilities that are kept: 8,192 positions × 32,768
CURE = "choose an allocation that needs no probe (allocation.damage: two_sided or relative_error)"


@dataclass(frozen=True)
class ProbeResult:
    """The candidate that was installed, its error on the curve and as it was built (the method's
    metric), and the divergence it caused.
    """

    setting: dict
    predicted: float
    measured: float
    kl: float  # nats per token

    @property
    def departure(self) -> float:
        """What a curve of screening errors is off by: measured ÷ predicted; 1 for closed forms, up
        to the cast.
        """
        return self.measured / self.predicted if self.predicted > 0 else 1.0


def probe_candidate(curve: Curve, fraction: float) -> Candidate:
    """Return the candidate whose size is nearest to a fraction of the dense size.

    For a factor pair that is the rank at `fraction` of the break-even rank, where the pair is as
    large as the weight.
    """
    return min(
        curve.candidates, key=lambda candidate: abs(candidate.bits - fraction * curve.dense_bits)
    )


class Prober:
    """Divergence from the model as it is now, on fixed windows, caused by replacing single
    linears.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokens: Tensor,
        batch_size: int,
        temperature: float = 1.0,
        skip: int = 0,
    ):
        """Run the model once and keep what its blocks and its trunk return.

        Args:
            model: the original, as it is now.
            tokens: (n, window) int64.
            batch_size: windows in one pass.
            temperature: of both distributions.
            skip: leading positions of each window that do not count.

        Raises CompressorError if the model cannot be run from the middle.
        """
        self.model, self.temperature, self.skip = model, temperature, skip
        self.head = Head(model)
        device = input_device(model)
        batches = [batch.to(device) for batch in tokens.split(batch_size)]
        self.restart = Restart(self.head, batches, CURE)
        self.positions = tokens.shape[0] * (tokens.shape[1] - skip)
        self.outside = self.head.outside  # those of the original, whatever is installed later
        self.known: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # as `_original` returns
        self.known_bytes = 0

    @torch.no_grad()
    def kl(self, modules: Mapping[str, nn.Module], block: int) -> float:
        """Measure KL(original‖modified) with `modules` (name → module) installed, nats per token.

        In float32 with float64 sums, arranged as Σ p log p − Σ p z + log Σ exp z so that a probe
        costs one exponential for each logit z.

        Args:
            modules: the modules to install.
            block: the first block that they touch.

        Raises NumericalError naming the modules if the divergence is not finite.
        """
        divergence = 0.0
        with installed(self.model, modules):
            for index in range(len(self.restart.batches)):
                hidden = self._counted(self.restart.hidden_from(block, index))
                for rows in self.head.chunks(len(hidden)):
                    logits = self._logits(index, hidden, rows)
                    divergence += _divergence(*self._original(index, rows), logits)
        if not divergence < float("inf"):
            raise NumericalError(
                f"{', '.join(modules)}: the model's output is not finite when this linear alone "
                "is compressed"
            )
        return divergence / self.positions

    def _counted(self, values: Tensor) -> Tensor:
        """Values (windows, length, …) of the positions that count: (positions, …)."""
        return values[:, self.skip :].flatten(0, 1)

    def _logits(self, index: int, hidden: Tensor, rows: slice) -> Tensor:
        """Logits (rows, vocabulary) of hidden states (positions, hidden) of batch `index`, over the
        temperature, float32 or wider.
        """
        tokens = self._counted(self.restart.batches[index])
        logits = self.head.logits(hidden[rows], tokens[rows])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits if self.temperature == 1 else logits / self.temperature

    def _original(self, index: int, rows: slice) -> tuple[Tensor, Tensor]:
        """Probabilities p (rows, vocabulary) of the original, and log p summed under p, (rows,)."""
        key = index, rows.start
        if key in self.known:
            return self.known[key]
        hidden = self._counted(self.restart.hidden[index])
        with installed(self.model, self.outside):
            p = self._logits(index, hidden, rows)
        entropies = []
        for (block,) in row_blocks(p):
            log_p = torch.log_softmax(block, -1)
            torch.exp(log_p, out=block)
            entropies.append(torch.linalg.vecdot(block, log_p))
        original = p, torch.cat(entropies)
        if self.known_bytes + p.nbytes <= KNOWN_BYTES:
            self.known[key] = original
            self.known_bytes += p.nbytes
        return original


def _divergence(p: Tensor, negative_entropy: Tensor, logits: Tensor) -> float:
    """KL(p‖softmax(logits)) summed over positions, nats. p, logits: (positions, vocabulary)."""
    total = negative_entropy.sum(dtype=torch.float64)
    for rows_p, rows in row_blocks(p, logits):
        cross = rows.logsumexp(-1) - torch.linalg.vecdot(rows_p, rows)
        total += cross.sum(dtype=torch.float64)
    return total.item()


def probe(prober: Prober, decomposition: Decomposition, block: int, fraction: float) -> ProbeResult:
    """Install one candidate of a decomposition, as it would be stored, and measure the divergence
    that it alone causes.
    """
    candidate = probe_candidate(decomposition.curve, fraction)
    modules, error = decomposition.build(candidate)
    return ProbeResult(candidate.setting, candidate.error, error, prober.kl(modules, block))


def predict_damages(curve: Curve, result: ProbeResult, weight: float = 1.0) -> list[float]:
    """Predict the divergence of every candidate of a curve, nats per token, times a depth weight.

    The curve gives ratios of errors only, so one whose screening errors are all too large by a
    factor predicts as well as an exact one.
    """
    scale = weight * result.kl / result.predicted if result.predicted > 0 else 0.0
    return [scale * candidate.error for candidate in curve.candidates]
