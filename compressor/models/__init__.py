"""Transformers models: loading them, finding their linears, installing others."""
