"""Whole checkpoints, that the tests spoil."""

import argparse
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dataset import DataSource
from models import create_model
from tests.reliability.hostile import packed
from tests.test_foreign import optimizer, options


@pytest.fixture(scope="session")
def nets():
    """Checkpoints of one network; and what they may hold in the place of what they should."""
    torch.manual_seed(0)
    model = create_model("resnet8", 2)
    model(torch.randn(4, 3, 8, 8))
    state = model.state_dict()
    about = {"arch": "resnet8", "epoch": 2, "accuracy": 66.7, "dataset": "folder", "n_cls": 2, "image_size": 8}
    opt = {"model": "resnet8", "lr_decay_epochs": [1, 2], "path_t": None}
    ours = {"model": dict(state), **about, "mean": [0.5] * 3, "std": [0.2] * 3, "opt": opt}
    foreign = {"epoch": 240, "accuracy": torch.tensor(72.5), "best_acc": np.float64(71), "optimizer": optimizer(state)}
    foreign |= {"model": state, "opt": options(model="resnet8")}
    images, labels = np.zeros((2, 8, 8, 3), np.uint8), np.arange(2)
    source = DataSource(images, labels, images, labels, 2, (0.5,) * 3, (0.2,) * 3, ("a", "b"))
    packs = {"zip": packed(ours), "old": packed(foreign, as_zip=False)}
    return SimpleNamespace(state=state, ours=ours, foreign=foreign, source=source, odd=odd_tensors(), **packs)


def odd_tensors():
    three = torch.zeros(3)
    dtypes = [torch.int64, torch.complex64, torch.bool, torch.bfloat16, torch.float64]
    return [
        *(
            three,
            three.requires_grad_(),
            torch.nn.Parameter(three.detach()),
            three.detach() / 0,
            *map(three.to, dtypes),
        ),
        *(torch.zeros(()), torch.zeros(0), torch.tensor([1, 2]), torch.zeros(2, 2, 2, 2), torch.zeros(3, 4).t()),
        *(
            torch.zeros(1).expand(10**10),
            three.detach().to_sparse(),
            torch.zeros(3, device="meta"),
            torch.zeros(200_000),
        ),
        *(np.float64(3), np.zeros(3), argparse.Namespace(x=1), (1, 2), b"x", {1, 2}, {(1, 2): 3}, bytearray(3), 3j),
        *(torch.float32, torch.Size([1]), torch.device("cpu")),
    ]
