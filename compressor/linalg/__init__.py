"""Linear algebra behind the methods: metrics, factors, products. Pure functions of tensors."""

from compressor.linalg.factor import (
    cholesky,
    drift,
    eigh_descending,
    exchange,
    pivot_columns,
    principal_outputs,
    require_finite,
)
from compressor.linalg.metric import Metric, relative_error, shrink

__all__ = [
    "Metric",
    "cholesky",
    "drift",
    "eigh_descending",
    "exchange",
    "pivot_columns",
    "principal_outputs",
    "relative_error",
    "require_finite",
    "shrink",
]
