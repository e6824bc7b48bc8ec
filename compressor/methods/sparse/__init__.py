"""Sparse weights, alone and with something beside or around them."""
