"""What the checkpoint tests share: a small model with everything that makes a checkpoint hard, and a short `save`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from seqba.checkpoint import rng_state, save_checkpoint

VOCABULARY, WIDTH = 11, 6
FILES = ["model.safetensors", "optimizer.pt", "rng.pt", "counters.json", "tensors.safetensors", "manifest.json"]


class Tied(nn.Module):
    """A language model of one matrix, with dropout and a buffer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.dropout = nn.Dropout(0.3)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.output = nn.Linear(WIDTH, VOCABULARY)
        self.output.weight = self.embedding.weight

    def forward(self, input_ids):
        return self.output(self.norm(self.dropout(self.embedding(input_ids))))


OPTIMIZERS = {
    "adam": lambda params: torch.optim.Adam(params, lr=0.1),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "asgd": lambda params: torch.optim.ASGD(params, lr=0.1, t0=0),
}


def make(optimizer="adam", dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model = Tied().to(dtype)
    return model, OPTIMIZERS[optimizer](model.parameters())


def step(model, optimizer, seed):
    torch.manual_seed(seed)
    loss = model(torch.randint(VOCABULARY, (7,))).float().square().sum()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def save(folder, update, model=None, optimizer=None, **options):
    if model is None:
        model, optimizer = make(seed=update)
    options = {"counters": {"update": update}, "rng": [rng_state()]} | options
    return save_checkpoint(folder, update, model=model, optimizer=optimizer, **options)


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def assert_bitwise(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
