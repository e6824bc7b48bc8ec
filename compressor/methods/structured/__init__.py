"""Removal of channels, heads, value dimensions and rotary pairs."""
