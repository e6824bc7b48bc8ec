"""Public import path of `load_recipe`: `from compressor.config import load_recipe`."""

from compressor.recipe.load import load_recipe

__all__ = ["load_recipe"]
