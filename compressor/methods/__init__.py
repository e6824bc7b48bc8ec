"""Decompositions. Importing this package imports every module below it, which registers the methods
by decorator.
"""

import importlib
import pkgutil

from compressor.methods.registry import METHODS, build, register

__all__ = ["METHODS", "build", "register"]

for _module in pkgutil.walk_packages(__path__, f"{__name__}."):
    importlib.import_module(_module.name)
