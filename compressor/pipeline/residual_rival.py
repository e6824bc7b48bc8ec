"""Whether low-rank residuals are worth their bytes: finer bases of no more bytes in their place, on
the held-out windows.

A residual spends bytes that more bits or smaller groups could have (quantisation card §1). Which
one wins depends on the width, the rank and the bits, so it is measured: the plan as it is, against
the plan whose linears with residuals have the finest base that fits instead. Both are solved on the
inputs of the dense model, whatever the run does later.
"""

from dataclasses import replace

from compressor.allocation.decompose import dense_weight, offering
from compressor.allocation.probe import Prober
from compressor.allocation.solve import Found
from compressor.linears import CompressedLinear
from compressor.linears.base import Modules
from compressor.methods.integers.quantize import QuantizeMethod
from compressor.pipeline import sequential_solve
from compressor.pipeline.job import Job
from compressor.plan import FINER_BASES, WITH_RESIDUALS, Candidate, Choice, Plan
from compressor.recipe.sections import Recipe
from compressor.statistics import LinearStats

GROUPS = ("auto:16", "auto:32", "auto:64", "auto:128", "channel")


def wanted(recipe: Recipe) -> bool:
    """Whether a plan of this recipe may have residuals that a finer base could stand in for."""
    listed = any(
        max(engine.options.get("residual") or (0,))
        for entry in recipe.method
        for engine in entry.candidates
    )
    return listed or recipe.compensation.enabled


def rank_of(choice: Choice) -> int:
    return choice.residual or (
        choice.setting.get("rank", 0) if choice.method == QuantizeMethod.name else 0
    )


def judged(
    job: Job, plan: Plan, base: tuple[Plan, Modules], found: Found, stats: dict[str, LinearStats]
) -> Plan:
    """The plan with two more entries in its contest, if it has residuals: held-out divergence with
    them, and with finer bases.

    base: plan and modules before compensation and before anything was solved again in order. The
    second entry is missing where no linear has a finer base of its kind that fits, or where no
    windows are held out.
    """
    adapted = {name: choice for name, choice in plan.linears.items() if rank_of(choice)}
    if not adapted or len(job.heldout.tokens) == 0:
        return plan
    finer = {}
    for name, choice in adapted.items():
        rival = finest(job, name, choice, base[0].linears[name], found, stats[name])
        finer |= {} if rival is None else {name: rival}
    if not finer:
        return plan
    recipe = job.recipe.model_copy(
        update={"calibration": job.recipe.calibration.model_copy(update={"sequential": False})}
    )
    ranked = replace(
        base[0],
        linears={
            name: replace(choice, residual=plan.linears[name].residual)
            for name, choice in base[0].linears.items()
        },
    )
    whole = sequential_solve.finish(
        replace(job, recipe=recipe), ranked, base[1], found, stats, ranked
    )[1]
    return replace(
        plan,
        contest=plan.contest
        | dict(
            zip((WITH_RESIDUALS, FINER_BASES), divergences(job, whole, whole | finer), strict=True)
        ),
    )


def finest(
    job: Job, name: str, choice: Choice, base: Choice, found: Found, stats: LinearStats
) -> CompressedLinear | None:
    """The finest base that takes no more bits than base and residual together; None if none is
    finer than the base.
    """
    if base.setting.get("shared"):
        return None
    part = offering(name, base, found[name])[0]
    dense = dense_weight(job.assignments[name])
    if not isinstance(part.method, QuantizeMethod):
        best = max(
            (one for one in part.curve.candidates if one.bits <= choice.bits),
            key=lambda one: one.bits,
        )
        return None if best.setting == base.setting else part.build(best)[0][name]
    own = {base.setting["group"], *part.method.group, *GROUPS}
    method = replace(
        part.method, bits=tuple(range(base.setting["bits"], 9)), group=tuple(own), residual=(0,)
    )
    fitting = [one for one in method.sizes(dense, name) if one.bits <= choice.bits]
    best = max(fitting, key=fineness)
    if fineness(best) <= (base.setting["bits"], -base.setting["group"]):
        return None
    return method.compress(method.prepare(name, dense, stats), best.setting)


def fineness(candidate: Candidate) -> tuple[int, int]:
    return candidate.setting["bits"], -candidate.setting["group"]


def divergences(job: Job, *rivals: Modules) -> list[float]:
    """KL(original‖model) of the model with each set of modules, nats per token on the held-out
    windows.
    """
    tokens, sums = job.heldout.tokens, [0.0] * len(rivals)
    with job.computing():
        for batch in tokens.split(job.recipe.calibration.batch_size):
            prober = Prober(job.model, batch, len(batch))
            sums = [
                total + prober.kl(modules, 0) * len(batch)
                for total, modules in zip(sums, rivals, strict=True)
            ]
    return [total / len(tokens) for total in sums]
