"""Verbs that stand in files of their own."""
