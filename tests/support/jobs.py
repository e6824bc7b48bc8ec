"""Jobs, and what their linears receive."""

from dataclasses import replace

import torch

from compressor.pipeline import build, run
from compressor.pipeline import job as jobs
from compressor.runtime.deadline import Deadline
from support.recipes import recipe


def job_of(model, text_file, *sets, config="svd_llm"):
    made = recipe(model, text_file, *sets, config=config)
    return jobs.start(made, jobs.open_source(str(model), None))


def exactly(job):
    """The same job in float64 throughout, so that no small gap of a spectrum magnifies rounding."""
    job.model.double()
    return replace(
        job,
        assignments={
            name: replace(one, dtype=torch.float64) for name, one in job.assignments.items()
        },
    )


def solved(job):
    """The solution of a job, from statistics that are collected now."""
    return build.plan_and_build(job, run.read_or_collect(job, None))


def built(job):
    """Plan and modules of a job."""
    solution = solved(job)
    return solution.plan, solution.modules


class Still:
    """A clock that stands still, for deadlines."""

    def __init__(self, now: float = 0.0):
        self.now = now

    def __call__(self) -> float:
        return self.now


def limited(job, seconds: float):
    """The same job, of whose budget so much is always left."""
    return replace(job, budget=Deadline(seconds, Still()))


def received(model, name, tokens):
    """Inputs of a linear, (tokens, in) float64, from one full pass."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda module, args: seen.append(args[0].double().flatten(0, -2))
    )
    with torch.no_grad():
        model(input_ids=tokens)
    handle.remove()
    return seen[0]
