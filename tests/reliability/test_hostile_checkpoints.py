"""Spoilt checkpoints: a network as it was, or one sentence."""

import argparse
import codecs
import collections
import io
import os
import pickle
import pickletools
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from helper import checkpoint
from helper.build import Teacher
from models import create_model
from scripts import convert_checkpoint
from tests.reliability.hostile import (
    VALUES,
    cases,
    changed,
    confined,
    damaged,
    outcome,
    outcome_of,
    packed,
    refilled,
    same_bits,
    scene,
    spoilt_network,
)
from tests.test_foreign import Call


def repickled(data, change):
    """A zip file with another pickle in it, and the right checksums."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as file, zipfile.ZipFile(out, "w") as to:
        for name in file.namelist():
            content = file.read(name)
            to.writestr(name, change(content) if name.endswith("data.pkl") else content)
    return out.getvalue()


def read_network(nets, path, exact=False, arch=None):
    """As train_student.py reads its teacher. exact: nothing but the whole file's network will do"""

    def read():
        found = checkpoint.load_network(path, arch)
        Teacher(found[0], found[2], 2, about=found[3], path=path).fit_for(nets.source, torch.device("cpu"))
        return found

    ended = outcome(read)
    if ended.code == 0:
        arch, n_cls, model, _ = ended.result
        state = model.state_dict()
        assert create_model(arch, n_cls).state_dict().keys() == state.keys()
        assert all(value.isfinite().all() for value in state.values())
        assert not exact or same_bits(state, nets.state)
    return ended


@cases(250)
def test_bytes(rng, folder, nets):
    (folder / "x.pth").write_bytes(damaged(nets.zip, rng))
    return read_network(nets, folder / "x.pth", exact=True)


@cases(250)
def test_bytes_of_the_old_format(rng, folder, nets):
    """It has no checksums: another number in a weight cannot be noticed."""
    (folder / "x.pth").write_bytes(damaged(nets.old, rng))
    return read_network(nets, folder / "x.pth")


@cases(250)
def test_the_pickle(rng, folder, nets):
    (folder / "x.pth").write_bytes(repickled(nets.zip, lambda content: damaged(content, rng)))
    return read_network(nets, folder / "x.pth")


@cases(250)
def test_content(rng, folder, nets):
    content = changed(rng.choice([nets.ours, nets.foreign]), rng, VALUES + nets.odd)
    (folder / "x.pth").write_bytes(packed(content, rng.random() < 0.5))
    return read_network(nets, folder / "x.pth", arch=rng.choice([None, "resnet8"]))


@cases(60)
def test_numbers(rng, folder, nets):
    content = {**nets.ours, "model": dict(nets.state)}
    refilled(content, rng)
    (folder / "x.pth").write_bytes(packed(content, rng.random() < 0.5))
    return read_network(nets, folder / "x.pth")


@cases(60)
def test_conversion(rng, folder, nets):
    spoilt_network(nets, rng, folder / "x.pth")
    target = rng.choice([folder / "out", folder / "out" / "y.pth"])
    ended = outcome_of(convert_checkpoint.main, folder / "x.pth", target, "--model", "resnet8")
    written = [path for path in folder.rglob("*.pth") if path.name != "x.pth"]
    assert len(written) == (ended.code == 0)
    for path in written:
        read_network(nets, path, arch="resnet8")
    return ended


def encoded(depth):
    """Twice as many bytes with each step."""
    value = b"x" * 1000
    for _ in range(depth):
        value = Call(codecs.encode, value, "hex")
    return value


ATTACKS = [
    lambda: Call(os.mkdir, "evil"),
    lambda: Call(exec, "open('evil', 'w')"),
    lambda: Call(Path.touch, Path("evil")),
    lambda: Call(subprocess.getoutput, "touch evil"),
    lambda: create_model("resnet8", 2),
    lambda: argparse.Namespace(x=Call(eval, "open('evil', 'w')")),
    lambda: Call(bytearray, 10**10),
    lambda: Call(torch.FloatTensor, 10**10),
    lambda: Call(torch.UntypedStorage, 10**10),
    lambda: encoded(30),
    lambda: Call(np.zeros, 10**10),
    lambda: Call(torch.load, "x.pth", state={"weights_only": False}),
]


@cases(40)
def test_attacks(rng, folder, nets):
    """Somewhere in a checkpoint, or as one."""
    attack = rng.choice(ATTACKS)()
    content = dict(nets.ours)
    content[rng.choice(["model", "arch", "opt", "mean", "more"])] = rng.choice([attack, [attack], {"x": attack}])
    content = attack if rng.random() < 0.1 else content
    bare = pickle.dumps(content, rng.choice([0, 2, 4])) if rng.random() < 0.2 else None
    (folder / "x.pth").write_bytes(bare or packed(content, rng.random() < 0.5))
    ended = read_network(nets, folder / "x.pth")
    assert ended.code == 2
    return ended


def opcodes(*parts):
    """A pickle, by hand."""
    return b"\x80\x02" + b"".join(parts) + b"."


BOMBS = {
    "a key whose hash has no end": opcodes(b"}", b")", b"\x85" * 300_000, b"K\x01s"),
    "a list in itself": opcodes(b"]q\x00h\x00a"),
    "no pickle": b"",
    "no end": b"\x80\x02" + b"]" * 100_000,
    "deep": opcodes(b"]" * 100_000, b"a" * 99_999),
    "a text that is not there": opcodes(b"X\xff\xff\xff\x7f"),
    "a number of 2040 bits": opcodes(b"}X\x01\0\0\0a\x8a\xff" + b"\x7f" * 255 + b"s"),
    "no such memory": opcodes(b"h\x07"),
    "memory for many": opcodes(b"}", b"r\xff\xff\xff\x7f"),
    "nothing on the stack": opcodes(b"0" * 3),
    "a state for a class": opcodes(b"ccollections\nOrderedDict\n}b"),
    "a state for a function": opcodes(b"ctorch._utils\n_rebuild_tensor_v2\n", b"N}X\x08\0\0\0__init__Ns\x86b"),
}


@cases(2 * len(BOMBS))
def test_bombs(rng, folder, nets):
    bomb = rng.choice(list(BOMBS.values()))
    numbers = [pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, {})]  # as an old checkpoint begins
    old = b"".join(numbers) + bomb + pickle.dumps([], 2)
    (folder / "x.pth").write_bytes(rng.choice([old, repickled(nets.zip, lambda _: bomb)]))
    ended = read_network(nets, folder / "x.pth")
    assert ended.code == 2
    return ended


class Pickled:
    """Pickled as a call with a state and items."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def tangle():
    """Forty small lists, and a tree of a million million for who does not see that they are the same."""
    value = 0
    for _ in range(40):
        value = [value, value]
    return value


def viewed(view):
    """A tensor of a thousand zeros, of a storage with metadata of a view (opcodes)."""

    class Pickler(pickle._Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", 1000, "a view") if value is ... else None

    file, args = io.BytesIO(), (..., 0, (1000,), (1,), False, collections.OrderedDict())
    Pickler(file, 2).dump({"x": Pickled(torch._utils._rebuild_tensor_v2, args)})
    content = file.getvalue().replace(b"X\6\0\0\0a view", view)
    return old_pickle(content, ["0"]) + (1000).to_bytes(8, "little") + bytes(4000)


def shadowed(content, **attributes):
    """An OrderedDict, with attributes in the place of its methods."""
    return Pickled(collections.OrderedDict, (), attributes, None, iter(content.items()))


CRAFTED = {
    "keys that are not compared in a lifetime": lambda nets: old_pickle(pickle.dumps({}, 2), [tangle(), tangle()]),
    "a view whose key's hash has no end": lambda nets: viewed(b")" + b"\x85" * 1_000_000),
    "a view of other elements": lambda nets: viewed(pickle.dumps(("1", 0, 1000), 2)[2:-1]),
    "an attribute for the file's methods": lambda nets: packed(shadowed(nets.ours, get=5)),
    "an attribute for a state's methods": lambda nets: packed({**nets.ours, "model": shadowed(nets.state, items=5)}),
    "keys of one hash": lambda nets: repickled(nets.zip, lambda _: keys_of_one_hash(200_000)),
    "a million dictionaries a megabyte": lambda nets: packed([{} for _ in range(10)] + [[] for _ in range(3_000_000)]),
    "bytes of one text, often": lambda nets: called("_codecs\nencode", ("x" * 1_000_000, "latin1"), 3000),
    "sets of one list, often": lambda nets: called("__builtin__\nset", (list(range(60_000)),), 1000),
    "sizes of one list, often": lambda nets: called("torch\nSize", ([1] * 500_000,), 600, b"\x81"),
    "numbers of a long byte order": lambda nets: called("numpy._core.multiarray\nscalar", long_order(), 100_000),
    "an attribute for a counter's methods": lambda nets: packed(Pickled(collections.Counter, (), {"get": 5})),
    "a set for a dtype": lambda nets: packed({"x": Pickled(np.float64(0).__reduce__()[0], ({1}, b"x"))}),
    "two members but for their case": lambda nets: doubled(nets.zip),
    "a tensor with hooks": lambda nets: packed({"x": Pickled(*hooked())}),
    "a weight twice": lambda nets: packed({**nets.state, "module.fc.bias": nets.state["fc.bias"]}),
    "less than it says": lambda nets: short_member(nets.zip),
}


def keys_of_one_hash(n):
    items = b"".join(pickle.dumps(i * (2**61 - 1), 2)[2:-1] + b"N" for i in range(n))
    return opcodes(b"}(", items, b"u")


def called(name, args, n, opcode=b"R"):
    """A pickle of many calls with the same arguments."""
    once = pickle.dumps(args, 2)[2:-1]
    function, given = b"\x00\x00\x10\x00", b"\x01\x00\x10\x00"  # where they are kept
    kept = [b"c", name.encode(), b"\nr", function, once, b"r", given, b"]("]
    return old_pickle(opcodes(*kept, (b"j" + function + b"j" + given + opcode) * n, b"e"))


def long_order():
    return Pickled(np.dtype, ("f8", False, True), (3, "0s" * 500_000, None, None, None, -1, -1, 0)), bytes(8)


def old_pickle(content, keys=()):
    """In the old format, without storages; content: a pickle."""
    parts = [pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, {}, list(keys))]
    return b"".join([*parts[:3], content, parts[3]])


def doubled(data):
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as file, zipfile.ZipFile(out, "w") as to:
        for name in file.namelist():
            to.writestr(name, file.read(name))
        to.writestr(name.upper(), file.read(name))
    return out.getvalue()


def hooked():
    function, args = torch.zeros(3).__reduce_ex__(2)[:2]
    return function, (*args[:-1], {"a": 1})


def short_member(data):
    """The directory says of one member that it is as long as its tensor, and it is not."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as file, zipfile.ZipFile(out, "w") as to:
        for name in file.namelist():
            content = file.read(name)
            to.writestr(name, content[:4] if name.endswith("data/6") else content)
            if name.endswith("data/6"):
                to.infolist()[-1].file_size = len(content)
    return out.getvalue()


@pytest.mark.parametrize("what", CRAFTED)
def test_crafted(what, nets, tmp_path):
    """Made by reviewers: most got through, hung, ended the process or gave a traceback before they were refused."""
    with confined(), scene(tmp_path / "case") as folder:
        (folder / "x.pth").write_bytes(CRAFTED[what](nets))
        assert read_network(nets, folder / "x.pth", arch="resnet8").code == 2


def test_what_training_scripts_keep_is_read(nets, tmp_path):
    schedule = torch.optim.lr_scheduler.MultiStepLR(torch.optim.SGD([torch.zeros(1)], 0.1), [150, 180, 210])
    opt = argparse.Namespace(device=torch.device("cuda:0"), size=torch.Size([3, 32, 32]), dtype=torch.float16)
    more = {"classes": {1, 2, "x"}, "raw": b"x" * 1000, None: 0, "image_size": [32, 32], "mean": (0.5, 0.5, 0.5)}
    content = {"model": nets.state, "lr_scheduler": schedule.state_dict(), "args": opt, **more}
    for as_zip in (True, False):
        (tmp_path / "x.pth").write_bytes(packed(content, as_zip))
        about = checkpoint.load_network(tmp_path / "x.pth", "resnet8")[3]
        assert about["lr_scheduler"]["milestones"] == schedule.milestones and vars(about["args"]) == vars(opt)
        assert about["raw"] == more["raw"] and about["classes"] == more["classes"]
        assert "image_size" not in about  # it is not ours that says so


def test_a_storage_without_a_view_is_read(tmp_path):
    (tmp_path / "x.pth").write_bytes(viewed(b"N"))
    assert torch.equal(checkpoint.load(tmp_path / "x.pth")["x"], torch.zeros(1000))


def test_zeros_are_not_unpacked(nets, tmp_path):
    """Ten gigabytes in ten megabytes."""
    with zipfile.ZipFile(tmp_path / "x.pth", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x/data.pkl", pickle.dumps({}, 2))
        with file.open("x/data/0", "w", force_zip64=True) as member:
            for _ in range(80):
                member.write(bytes(2**24))
    with confined():
        assert "unpacks to more than it holds" in read_network(nets, tmp_path / "x.pth").said


def test_memory_that_was_never_filled_is_no_network(nets, tmp_path):
    """An old checkpoint whose list of storages is empty: torch gives what the memory held before."""
    file = io.BytesIO(nets.old)
    for _ in range(4):
        list(pickletools.genops(file))
    (tmp_path / "x.pth").write_bytes(nets.old[: file.tell()] + pickle.dumps([], 2))
    assert torch.load(tmp_path / "x.pth", weights_only=False)["model"].keys() == nets.state.keys()
    assert "its tensors are not what it holds" in read_network(nets, tmp_path / "x.pth").said


def test_a_member_that_torch_takes_for_a_folder(nets, tmp_path):
    """torch does not read its content, nor say so."""
    data = bytearray(nets.zip)
    at = data.index(b"archive/data/6", data.index(b"PK\1\2"))  # in the directory at the end
    data[at - 8] |= 0x10
    (tmp_path / "x.pth").write_bytes(data)
    assert read_network(nets, tmp_path / "x.pth", exact=True).code == 0
