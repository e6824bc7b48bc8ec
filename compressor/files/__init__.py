"""Folders and files, read safely and written whole."""
