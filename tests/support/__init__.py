"""What tests share: models, modules, recipes, runs."""
