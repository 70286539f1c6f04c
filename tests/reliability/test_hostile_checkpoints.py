"""Damaged checkpoints: the network as it was, or one sentence."""

import argparse
import os
import pickle
import re
import subprocess
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from helper import checkpoint
from models import create_model
from scripts import convert_checkpoint
from tests.reliability.hostile import (
    VALUES,
    cases,
    changed,
    damaged,
    misplaced,
    outcome,
    outcome_of,
    packed,
    same_bits,
    spoilt_network,
)
from tests.test_foreign import Call


def read_network(nets, path, exact=False, arch=None):
    """As every script reads a network. exact: only the intact file's weights will do"""
    ended = outcome(lambda: checkpoint.load_network(path, arch))
    if ended.code == 0:
        arch, n_cls, model, about = ended.result
        state = model.state_dict()
        assert create_model(arch, n_cls).state_dict().keys() == state.keys()
        assert all(value.isfinite().all() for value in state.values())
        assert all(valid(about[key]) for key, valid in checkpoint.SAID.items() if key in about)
        assert not exact or same_bits(state, nets.state)
    else:
        assert str(path) in ended.said
        assert not re.search("Error|NoneType|object|torch[.]load", ended.said.removeprefix(str(path))), ended.said
    return ended


@cases(400)
def test_bytes(rng, folder, nets):
    (folder / "x.pth").write_bytes(damaged(nets.zip, rng))
    return read_network(nets, folder / "x.pth", exact=True)


@cases(400)
def test_bytes_of_the_old_format(rng, folder, nets):
    """It has no checksums: another number in a weight cannot be noticed."""
    (folder / "x.pth").write_bytes(damaged(nets.old, rng))
    return read_network(nets, folder / "x.pth")


@cases(60)
def test_bytes_of_safetensors(rng, folder, nets):
    (folder / "x.safetensors").write_bytes(damaged(safetensors.torch.save(nets.state), rng))
    return read_network(nets, folder / "x.safetensors")


@cases(400)
def test_content(rng, folder, nets):
    """Entries that are missing, of another type, or too many."""
    content = changed(rng.choice([nets.ours, nets.foreign]), rng, VALUES + nets.odd)
    (folder / "x.pth").write_bytes(packed(content, rng.random() < 0.5))
    return read_network(nets, folder / "x.pth", arch=rng.choice([None, "resnet8"]))


@cases(100)
def test_numbers(rng, folder, nets):
    """One weight, or all of a tensor, is NaN, infinite, negative, huge or zero."""
    state = {key: value.clone() for key, value in nets.state.items()}
    key = rng.choice(list(state))
    numbers = [float("nan"), float("inf"), -1.0, 1e30, 0.0] if state[key].is_floating_point() else [-1, 0, 2**62]
    state[key][(slice(rng.choice([None, 1])),) * state[key].dim()].fill_(rng.choice(numbers))
    (folder / "x.pth").write_bytes(packed({**nets.ours, "model": state}, rng.random() < 0.5))
    ended = read_network(nets, folder / "x.pth")
    finite = all(value.isfinite().all() for value in state.values())
    negative = key.endswith("running_var") and (state[key] < 0).any()
    assert (ended.code == 0) == (finite and not negative)
    return ended


@cases(80)
def test_conversion(rng, folder, nets):
    spoilt_network(nets, rng, folder / "x.pth")
    target = rng.choice([folder / "out", folder / "out" / "y.pth"])
    ended = outcome_of(convert_checkpoint.main, folder / "x.pth", target, "--model", "resnet8")
    written = [path for path in folder.rglob("*.pth") if path.name != "x.pth"]
    assert len(written) == (ended.code == 0)
    for path in written:
        read_network(nets, path, arch="resnet8")
    return ended


@cases(40)
def test_something_else_at_the_path(rng, folder, nets):
    (folder / "x.pth").write_bytes(nets.zip)
    misplaced(folder / "x.pth", rng)
    ended = read_network(nets, folder / "x.pth")
    assert ended.code == 2
    return ended


ATTACKS = [
    lambda: Call(os.mkdir, "evil"),
    lambda: Call(exec, "open('evil', 'w')"),
    lambda: Call(Path.touch, Path("evil")),
    lambda: Call(subprocess.getoutput, "touch evil"),
    lambda: create_model("resnet8", 2),
    lambda: argparse.Namespace(x=Call(eval, "open('evil', 'w')")),
    lambda: Call(np.zeros, 10**10),
    lambda: Call(torch.load, "x.pth", state={"weights_only": False}),
]


@cases(100)
def test_foreign_pickles(rng, folder, nets):
    """Calls and objects, somewhere in a checkpoint or as the whole of it."""
    attack = rng.choice(ATTACKS)()
    content = dict(nets.ours)
    content[rng.choice(["model", "arch", "opt", "mean", "more"])] = rng.choice([attack, [attack], {"x": attack}])
    content = attack if rng.random() < 0.1 else content
    bare = pickle.dumps(content, rng.choice([0, 2, 4])) if rng.random() < 0.2 else None
    (folder / "x.pth").write_bytes(bare or packed(content, rng.random() < 0.5))
    ended = read_network(nets, folder / "x.pth")
    assert ended.code == 2
    return ended
