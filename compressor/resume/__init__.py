"""What a stopped run has finished, and how the next one finds it."""
