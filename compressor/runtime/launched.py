"""Which process this is, where `accelerate launch` or torchrun has started several with the same
command.
"""

import os


def world_size() -> int:
    """Return how many processes were started together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


def process_rank() -> int:
    """Return the number of this process; 0 is the main one, which alone writes and shows."""
    return int(os.environ.get("RANK", 0)) if world_size() > 1 else 0
