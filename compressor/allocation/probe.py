"""What truncating one linear does to the model's output: KL(original‖probed) on held-out windows,
one linear at a time.

Reference: LEMS (ICML 2026; low-rank card, rule R10). One measured divergence gives the scale of a
linear's damage, its error curve the shape: damage(size) = KL(probe) · error(size) / error(probe).

Differs from the authors' code: the original's block outputs are cached once, so that a probe costs
only the blocks behind its linear.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compressor.allocation.decompose import Decomposition
from compressor.errors import NumericalError
from compressor.models.install import installed
from compressor.models.partial_forward import Restart
from compressor.plan import Candidate, Curve


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
    """The candidate whose size is nearest to a fraction of the dense size.

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
        """Run the model once on tokens (n, window), int64, and keep its block outputs and logits.

        temperature: of both distributions; skip: leading positions of each window that do not
        count.
        """
        device = "cpu" if model.device.type == "meta" else model.device
        self.model, self.temperature, self.skip = model, temperature, skip
        self.restart = Restart(model, [batch.to(device) for batch in tokens.split(batch_size)])
        self.positions = tokens.shape[0] * (tokens.shape[1] - skip)
        self.original: list[
            tuple[Tensor, float]
        ] = []  # probabilities p (batch, counted, vocabulary) and Σ p log p
        for index in range(len(self.restart.batches)):
            log_p = torch.log_softmax(self._logits(index, len(self.restart.outputs[index])), -1)
            p = log_p.exp()
            self.original.append((p, torch.linalg.vecdot(p, log_p).sum(dtype=torch.float64).item()))

    def _logits(self, index: int, block: int) -> Tensor:
        """Logits of one batch at the counted positions, over the temperature, float32 or wider."""
        logits = self.restart.logits(index, block)[:, self.skip :]
        return logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature

    @torch.no_grad()
    def kl(self, modules: dict[str, nn.Module], block: int) -> float:
        """KL(original‖modified) with `modules` (name → module) installed, nats per token; `block`
        is the first block they touch.

        As `scoring.kl_sum`, in float32 with float64 sums, arranged as Σ p log p − Σ p z + Σ log Σ
        exp z so that a probe costs one exponential for each logit z. Raises NumericalError naming
        the modules if the divergence is not finite.
        """
        divergence = 0.0
        with installed(self.model, modules):
            for index, (p, negative_entropy) in enumerate(self.original):
                logits = self._logits(index, block)
                cross = logits.logsumexp(-1) - torch.linalg.vecdot(p, logits)
                divergence += negative_entropy + cross.sum(dtype=torch.float64).item()
        if not divergence < float("inf"):
            raise NumericalError(
                f"{', '.join(modules)}: the model's output is not finite when this linear alone "
                "is compressed"
            )
        return divergence / self.positions


def probe(prober: Prober, decomposition: Decomposition, block: int, fraction: float) -> ProbeResult:
    """Install one candidate of a decomposition, as it would be stored, and measure the divergence
    that it alone causes.
    """
    candidate = probe_candidate(decomposition.curve, fraction)
    modules, error = decomposition.build(candidate)
    return ProbeResult(candidate.setting, candidate.error, error, prober.kl(modules, block))


def predict_damages(curve: Curve, result: ProbeResult, weight: float = 1.0) -> list[float]:
    """Predicted divergence of every candidate of a curve, nats per token, times a depth weight.

    The curve gives ratios of errors only, so one whose screening errors are all too large by a
    factor predicts as well as an exact one.
    """
    scale = weight * result.kl / result.predicted if result.predicted > 0 else 0.0
    return [scale * candidate.error for candidate in curve.candidates]
