"""Small models in training."""

from compressor.models.linears import linears
from compressor.recipe.training import Heal
from compressor.training.losses import Objective
from support.modules import low_rank

NOISE = 2e-2  # relative, of divergences of some 1e-5 nats computed in float32


SECTION = Heal(enabled=True, steps=30, check=10, learning_rate=0.02)


def modules_of(model, rank=4):
    return {
        name: low_rank(info.module.weight, None, rank, True)
        for name, info in linears(model).items()
        if "down" in name
    }


def loss_of(original, kind="kl", **settings):
    return Objective(original, Heal(loss=kind, **settings)).loss
