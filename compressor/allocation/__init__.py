"""One budget over all linears: candidates, their damage, and who gets what."""
