"""Sparse codes over dictionaries of atoms."""
