"""Eigenbases, factors, metrics and products of matrices: functions of tensors."""
