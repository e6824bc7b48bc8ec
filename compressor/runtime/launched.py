"""Which process this is, where `accelerate launch` or torchrun has started several with the same
command.
"""

import os


def count() -> int:
    """How many were started together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


def rank() -> int:
    """Number of this one; 0 is the main process, which alone writes and shows anything."""
    return int(os.environ.get("RANK", 0)) if count() > 1 else 0
