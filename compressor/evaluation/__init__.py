"""Perplexity, divergence, lm-eval scores, speed."""
