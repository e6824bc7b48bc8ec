"""Recipes: the sections of the YAML file, how they are loaded, the presets."""
