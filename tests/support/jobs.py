"""Jobs, and what their linears receive."""

from dataclasses import replace

import torch

from compressor.pipeline import job as jobs
from compressor.pipeline import run, stages
from compressor.runtime.progress import silent
from compressor.runtime.stopwatch import Stopwatch
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


def built(job):
    return run.plan_and_build(job, stages.statistics(job), None, Stopwatch(), silent)


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
