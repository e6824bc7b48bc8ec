"""Low-rank factors, and low-rank residuals of anything else."""
