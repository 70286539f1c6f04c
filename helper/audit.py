"""What a checkpoint asks for, found out before torch.load makes any of it.

torch.load(weights_only=True) runs no code, but makes all else: gigabytes out of a few bytes, keys nested so deep that
hashing them ends the process, tensors of memory that nothing was read into.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from pathlib import Path

import torch

ZIP, OLD = b"PK\3\4", b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."  # how torch's two formats begin
LARGEST = 2**21  # bytes of a pickle, some 12,000 tensors; its objects take up to 110 times as much
MOST_DIMS = 64
USED = (
    "PROTO STOP MARK GLOBAL REDUCE NEWOBJ BUILD BINPERSID BINPUT LONG_BINPUT BINGET LONG_BINGET NONE NEWTRUE NEWFALSE "
    "BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINSTRING EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS"
)
BITS = {"Double": 64, "Float": 32, "Half": 16, "BFloat16": 16, "Long": 64, "Int": 32, "Short": 16, "Char": 8, "Byte": 8}
SIZES = {f"torch.{name}Storage": bits // 8 for name, bits in {**BITS, "Bool": 8}.items()}  # bytes of an element
DTYPES = {str(value) for value in vars(torch).values() if isinstance(value, torch.dtype)}


class Mapping(dict):
    """Stands for an OrderedDict."""

    closed = False

    def __init__(self) -> None:  # of nothing: what fills it is looked at
        super().__init__()

    def __setitem__(self, key: object, value: object) -> None:
        if self.closed:
            raise ValueError("a tensor with hooks")
        super().__setitem__(key, value)

    def close(self) -> None:
        """It is a tensor's hooks: there are none."""
        self.closed = True
        if self:
            raise ValueError("a tensor with hooks")


class Options:
    """Stands for an argparse.Namespace."""


class Value:
    """Stands for what is made of plain values: sets, sizes, devices, numbers."""

    def __init__(self, *args: object):
        if not all(is_plain(item) for arg in args for item in (arg if isinstance(arg, list | tuple | dict) else [arg])):
            raise ValueError("a value made of other than plain ones")


class Dtype(Value):
    """Stands for one of numpy's."""


class Storage(int):
    """Stands for memory of so many elements."""


class Tensor:
    """Stands for a part of a storage."""

    def __init__(self, storage: Storage, offset: int, size: tuple, stride: tuple, requires_grad: bool, hooks: Mapping):
        if not isinstance(storage, Storage) or len(size) > MOST_DIMS or min(0, offset, *size, *stride) < 0:
            raise ValueError("a tensor of no shape")
        hooks.close()
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        # also where elements share memory: a copy would not
        if 0 not in size and max(last + 1, math.prod(size)) > storage:
            raise ValueError("a tensor is larger than its storage")


def parameter(data: Tensor, requires_grad: bool, hooks: Mapping) -> Tensor:
    if not isinstance(data, Tensor):
        raise ValueError("a parameter is no tensor")
    hooks.close()
    return data


def encoded(text: str, encoding: str) -> Value:
    """Old pickles hold bytes as text."""
    if not isinstance(text, str) or encoding != "latin1":  # others may give twice as many each time
        raise ValueError("bytes that are no text")
    return Value()


def scalar(dtype: Dtype, data: Value) -> Value:
    """A number of numpy's."""
    if not isinstance(dtype, Dtype):
        raise ValueError("a number of no type")
    return Value()


def is_plain(value: object) -> bool:
    """Whether it may be a key: hashing it has an end, and few have one hash (as all multiples of 2**61 - 1 do)."""
    return value is None or isinstance(value, str) or (isinstance(value, int) and abs(value) < 2**60)


CALLED = {"collections.OrderedDict": Mapping, "argparse.Namespace": Options, "_codecs.encode": encoded}
CALLED |= {"torch._utils._rebuild_tensor_v2": Tensor, "torch._utils._rebuild_parameter": parameter}
CALLED |= dict.fromkeys(("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"), scalar)
CALLED |= dict.fromkeys(("torch.device", "torch.Size", "collections.Counter"), Value)
CALLED |= dict.fromkeys(("builtins.set", "__builtin__.set"), Value) | {"numpy.dtype": Dtype}


class Opcodes(dict):
    def __missing__(self, code: int) -> None:
        raise ValueError(f"a pickle of another kind, with opcode {code}")


class Audit(pickle._Unpickler):  # Python's, not C's: that makes room for what a file says will come
    """Goes through pickles; `storages` then has the type and number of elements of each storage.

    Raises UnpicklingError for what no checkpoint asks for, and ValueError and others for one that is damaged.
    """

    codes = [getattr(pickle, name)[0] for name in USED.split()]
    dispatch = Opcodes((code, pickle._Unpickler.dispatch[code]) for code in codes)

    def __init__(self, content: bytes):
        if len(content) > LARGEST:
            raise ValueError(f"a pickle of more than {LARGEST:,} bytes")
        self.file = io.BytesIO(content)
        super().__init__(self.file)
        self.storages: dict[str, tuple[str, int]] = {}
        self.given = 0  # how much calls were given

    def sizes(self) -> dict[str, int]:
        """Bytes of each storage."""
        return {key: n * SIZES[kind] for key, (kind, n) in self.storages.items()}

    def find_class(self, module: str, name: str) -> object:
        asked = f"{module}.{name}"
        if asked not in CALLED and asked not in SIZES and asked not in DTYPES:
            raise pickle.UnpicklingError(f"it asks for {asked.removeprefix('__builtin__.').removeprefix('builtins.')}")
        return CALLED.get(asked) or asked

    def persistent_load(self, pid: tuple) -> Storage:
        _, kind, key, _, n, *view = pid
        if not isinstance(kind, str) or not isinstance(key, str) or not isinstance(n, int) or n < 0:
            raise ValueError("a storage of no size")
        if kind not in SIZES or self.storages.setdefault(key, (kind, n)) != (kind, n) or view not in ([], [None]):
            raise ValueError("a storage of two sizes")
        return Storage(n)

    def load_setitem(self) -> None:
        self.check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        self.check_keys(self.stack[::2])  # all since the mark
        super().load_setitems()

    def check_keys(self, keys: list) -> None:
        if not all(map(is_plain, keys)):
            raise ValueError("a key is neither text nor number")

    def load_build(self) -> None:
        """Attributes that are set: of a state dict nothing but its versions, they could stand for its methods."""
        state, what = self.stack.pop(), self.stack[-1]
        well = isinstance(state, dict) and (isinstance(what, Options) or state.keys() <= {"_metadata"})
        if not (isinstance(what, Mapping | Options) and well) and not isinstance(what, Dtype):
            raise ValueError("a state of what has none")

    def load_reduce(self) -> None:
        """What is in the file once may be given to many calls, each of which makes something of its size."""
        args = self.stack[-1]
        self.given += len(args) + sum(len(arg) for arg in args if hasattr(arg, "__len__"))
        if self.given > LARGEST:
            raise ValueError("it makes more than it holds")
        super().load_reduce()

    def load_newobj(self) -> None:
        if self.stack[-2:] != [Options, ()]:
            raise ValueError("an object of another kind")
        self.stack[-2:] = [Options()]

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_newobj


def audited(path: Path) -> io.BytesIO:
    """What torch.load may read in place of a checkpoint's file."""
    with open(path, "rb") as file:
        start = file.read(len(OLD))
        file.seek(0)
        if start.startswith(ZIP):
            return from_zip(file)
        if start == OLD:
            return from_pickles(file.read())
    raise ValueError("it begins like none")


def from_zip(file: io.BufferedReader) -> io.BytesIO:
    """The same members in a new archive: torch neither looks at checksums nor reads all archives as Python does."""
    copy, sizes, pickles = io.BytesIO(), {}, {}
    with zipfile.ZipFile(file) as members, zipfile.ZipFile(copy, "w") as out:
        infos = members.infolist()
        if sum(info.file_size for info in infos) > file.seek(0, io.SEEK_END):
            raise ValueError("it unpacks to more than it holds")
        for info in infos:
            name = info.filename.lower()  # torch finds them in any case
            if name in sizes or info.compress_type != zipfile.ZIP_STORED:
                raise ValueError("an archive of another kind")
            content = members.read(info)
            out.writestr(info.filename, content)
            sizes[name] = len(content)
            if name.endswith("data.pkl"):
                pickles[name] = content
    for name, content in pickles.items():
        pickled = Audit(content)
        pickled.load()
        if any(sizes.get(f"{name[:-8]}data/{key}".lower()) != size for key, size in pickled.sizes().items()):
            raise ValueError("its tensors are not what it holds")
    copy.seek(0)
    return copy


def from_pickles(content: bytes) -> io.BytesIO:
    """Five (a magic number, a version, the system, the content, the storages' keys), then the storages."""
    pickled = Audit(content[:LARGEST])
    *_, keys = [pickled.load() for _ in range(5)]
    sizes = pickled.sizes()
    rest = len(content) - pickled.file.tell()
    if keys != sorted(sizes) or rest != sum(8 + size for size in sizes.values()):
        raise ValueError("its tensors are not what it holds")
    return io.BytesIO(content)
