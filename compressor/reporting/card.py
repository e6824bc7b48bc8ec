"""The model card of a checkpoint."""

import re
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from compressor.plan import DENSE
from compressor.reporting.report import (
    HEADINGS,
    MIX,
    before_after,
    least_kept,
    method_mix,
    residuals,
    searched,
)
from compressor.reporting.tables import kept_removed

TEMPLATE = Path(__file__).parent / "templates" / "card.md.j2"


def model_card(
    report: dict[str, Any], recipe_yaml: str, source_name: str, license: str | None = None
) -> str:
    """README.md of the checkpoint: front matter, how to load it, what it is, figures, recipe,
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
        rows=[[cell.replace("|", "\\|") for cell in row] for row in before_after(report)],
        mix_headings=MIX,
        mix=method_mix(report),
        least_kept=least_kept(report),
        residuals=residuals(report),
        searched=searched(report),
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
