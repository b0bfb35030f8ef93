"""What all tests share: quiet transformers, no progress bars, torch's seed."""

import os

# before anything imports them: no hub look-ups, no threads left behind by tokenizers
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers

transformers.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same generator state, whatever ran before it."""
    torch.manual_seed(0)
