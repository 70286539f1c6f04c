"""Intact checkpoints, for the tests to damage."""

import argparse
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from models import create_model
from tests.reliability.hostile import packed
from tests.test_foreign import optimizer, options


@pytest.fixture(scope="session")
def nets():
    """Checkpoints of one network, and values of other types."""
    torch.manual_seed(0)
    model = create_model("resnet8", 2)
    model(torch.randn(4, 3, 8, 8))
    state = model.state_dict()
    about = {"arch": "resnet8", "epoch": 2, "accuracy": 66.7, "dataset": "folder", "n_cls": 2, "image_size": 8}
    opt = {"model": "resnet8", "lr_decay_epochs": [1, 2], "path_t": None}
    ours = {"model": dict(state), **about, "mean": [0.5] * 3, "std": [0.2] * 3, "opt": opt}
    foreign = {"epoch": 240, "accuracy": torch.tensor(72.5), "best_acc": np.float64(71), "optimizer": optimizer(state)}
    foreign |= {"model": state, "opt": options(model="resnet8")}
    packs = {"zip": packed(ours), "old": packed(foreign, as_zip=False)}
    return SimpleNamespace(state=state, ours=ours, foreign=foreign, odd=odd_values(), **packs)


def odd_values():
    three = torch.zeros(3)
    dtypes = [torch.int64, torch.complex64, torch.bool, torch.bfloat16, torch.float64]
    shapes = [torch.zeros(()), torch.zeros(0), torch.zeros(2, 2, 2, 2), torch.zeros(3, 4).t(), torch.zeros(200_000)]
    return [
        *(three, torch.zeros(3, requires_grad=True), torch.nn.Parameter(three), three / 0, torch.tensor([1, 2])),
        *(torch.zeros(1).expand(10**10), three.to_sparse(), torch.zeros(3, device="meta"), *shapes),
        *(np.float64(3), np.zeros(3), argparse.Namespace(x=1), (1, 2), b"x", {1, 2}, {(1, 2): 3}, bytearray(3), 3j),
        *(torch.float32, torch.Size([1]), torch.device("cpu"), *map(three.to, dtypes)),
    ]
