"""What surrounds a run: progress, deadlines, logs, times, launched processes."""
