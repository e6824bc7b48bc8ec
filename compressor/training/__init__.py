"""Training of what is stored: block by block (repair) and as a whole (healing)."""
