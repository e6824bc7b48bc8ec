"""Copies of a checkpoint that other software reads."""
