"""compressor: shrink a trained causal language model without retraining it, and prove what that
cost.

The package imports nothing heavy by itself: `compress`, `evaluate` and `load` (of
`compressor.pipeline.run`) are resolved on first use.
"""

from importlib import import_module

__version__ = "0.1.0"
__all__ = ["compress", "evaluate", "load"]


def __getattr__(name: str):
    if name in __all__:
        return getattr(import_module("compressor.pipeline.run"), name)
    raise AttributeError(f"module 'compressor' has no attribute {name!r}")
