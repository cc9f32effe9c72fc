"""Experiments on finished models and variants of the recipe: comparisons, calibration, memorisation, model cards."""
