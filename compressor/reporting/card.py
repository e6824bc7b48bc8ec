"""The model card of a checkpoint."""

import re
from pathlib import Path, PurePath

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from compressor.plan import DENSE
from compressor.reporting.records import Report
from compressor.reporting.report import (
    HEADINGS,
    MIX,
    before_after_rows,
    describe_least_kept,
    describe_residuals,
    describe_search,
    method_rows,
)
from compressor.reporting.tables import kept_removed

TEMPLATE = Path(__file__).parent / "templates" / "card.md.j2"


def model_card(
    report: Report, recipe_yaml: str, source_name: str, license: str | None = None
) -> str:
    """Write README.md of the checkpoint: front matter, how to load it, what it is, figures, recipe,
    limits.

    source_name: hub id, `reference` or folder of the original; of an absolute folder only the last
    part is shown.
    """
    name = PurePath(source_name).name if PurePath(source_name).is_absolute() else source_name
    methods = sorted({linear["method"] for linear in report["linears"]} - {DENSE})
    data = ModelCardData(
        base_model=name if _is_hub_id(name) else None,
        library_name="transformers",
        license=license,
        pipeline_tag="text-generation",
        tags=["compressor", "compression", *methods],
    )
    longest = max(map(len, re.findall("`+", recipe_yaml)), default=0)
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        source_name=name,
        report=report,
        headings=HEADINGS,
        rows=[[cell.replace("|", "\\|") for cell in row] for row in before_after_rows(report)],
        mix_headings=MIX,
        mix=method_rows(report),
        least_kept=describe_least_kept(report),
        residuals=describe_residuals(report),
        searched=describe_search(report),
        trained=[stage for stage, outcome in report["trained"].items() if outcome["kept"]],
        kept=kept_removed(report["kept"]["targets"]),
        recipe=recipe_yaml.strip(),
        fence="`" * max(3, longest + 1),
    )
    return str(card).rstrip() + "\n"


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
