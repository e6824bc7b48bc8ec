"""Compressed checkpoints: written, verified, exported, uploaded."""
