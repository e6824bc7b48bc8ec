"""The stages of a run, and the runs that are made of them."""
