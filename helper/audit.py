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

ZIP, OLD = b"PK\3\4", b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."  # how torch's two formats begin
USED = (
    "PROTO STOP MARK GLOBAL REDUCE NEWOBJ BUILD BINPERSID BINPUT LONG_BINPUT BINGET LONG_BINGET NONE NEWTRUE NEWFALSE "
    "BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINSTRING EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS"
)
MOST_DIMS = 64
LONGEST_NUMBER = 16  # bytes of one of numpy's

SIZES = {"Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1}
SIZES = {f"torch.{name}Storage": size for name, size in {**SIZES, "Bool": 1}.items()}  # bytes of an element


class Object(dict):
    """Stands for what takes no more memory than its file: a dictionary, options, a number of numpy's."""

    def __init__(self) -> None:  # of nothing else
        super().__init__()


class Storage(int):
    """Stands for memory of so many elements."""


class Tensor:
    """Stands for a part of a storage."""

    def __init__(self, storage: Storage, offset: int, size: tuple, stride: tuple, requires_grad: bool, hooks: Object):
        if not isinstance(storage, Storage) or len(size) > MOST_DIMS or min(0, offset, *size, *stride) < 0:
            raise ValueError("a tensor of no shape")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        # also where elements share memory: a copy would not
        if 0 not in size and max(last + 1, math.prod(size)) > storage:
            raise ValueError("a tensor is larger than its storage")


def parameter(data: Tensor, *_: object) -> Tensor:
    if not isinstance(data, Tensor):
        raise ValueError("a parameter is no tensor")
    return data


def encoded(text: str, encoding: str) -> Object:
    """Old pickles hold bytes as text."""
    if len(text) > LONGEST_NUMBER or encoding != "latin1":
        raise ValueError("bytes that are no number")
    return Object()


def number(*_: object) -> Object:
    return Object()


CALLED = {"collections.OrderedDict": Object, "argparse.Namespace": Object, "_codecs.encode": encoded}
CALLED |= {"torch._utils._rebuild_tensor_v2": Tensor, "torch._utils._rebuild_parameter": parameter}
CALLED |= dict.fromkeys(("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"), number)


class Opcodes(dict):
    def __missing__(self, code: int) -> None:
        raise ValueError(f"a pickle of another kind, with opcode {code}")


class Audit(pickle._Unpickler):  # Python's, not C's: that makes room for what a file says will come
    """Goes through pickles; `storages` then has the bytes of each storage.

    Raises UnpicklingError for what no checkpoint asks for, and ValueError and others for one that is damaged.
    """

    codes = [getattr(pickle, name)[0] for name in USED.split()]
    dispatch = Opcodes((code, pickle._Unpickler.dispatch[code]) for code in codes)

    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self.storages: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> object:
        asked = f"{module}.{name}"
        if asked not in CALLED and asked not in SIZES:
            raise pickle.UnpicklingError(f"it asks for {asked.removeprefix('__builtin__.').removeprefix('builtins.')}")
        return CALLED.get(asked) or asked

    def persistent_load(self, pid: tuple) -> Storage:
        _, kind, key, _, n, *_ = pid
        if not isinstance(kind, str) or not isinstance(key, str) or not isinstance(n, int) or n < 0:
            raise ValueError("a storage of no size")
        if self.storages.setdefault(key, n * SIZES[kind]) != n * SIZES[kind]:
            raise ValueError("a storage of two sizes")
        return Storage(n)

    def load_setitem(self) -> None:
        self.check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        self.check_keys(self.stack[::2])  # all since the mark
        super().load_setitems()

    def check_keys(self, keys: list) -> None:
        if not all(isinstance(key, str | int | float) for key in keys):
            raise ValueError("a key is neither text nor number")

    def load_build(self) -> None:
        self.stack.pop()
        if not isinstance(self.stack[-1], Object):
            raise ValueError("a state of what has none")

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.BUILD[0]] = load_build


def audited(path: Path) -> io.BytesIO:
    """What torch.load may read in place of a checkpoint's file."""
    with open(path, "rb") as file:
        start = file.read(len(OLD))
        file.seek(0)
        if start.startswith(ZIP):
            return from_zip(file)
        if start == OLD:
            return from_pickles(io.BytesIO(file.read()))
    raise ValueError("it begins like none")


def from_zip(file: io.BufferedReader) -> io.BytesIO:
    """The same members in a new archive: torch neither looks at checksums nor reads all archives as Python does."""
    copy = io.BytesIO()
    with zipfile.ZipFile(file) as members, zipfile.ZipFile(copy, "w") as out:
        sizes = {member.filename: member.file_size for member in members.infolist()}
        if len(sizes) < len(members.infolist()) or sum(sizes.values()) > file.seek(0, io.SEEK_END):
            raise ValueError("it unpacks to more than it holds")
        for name in sizes:
            content = members.read(name)
            out.writestr(name, content)
            if name.lower().endswith("data.pkl"):  # torch looks for it in any case
                pickled = Audit(io.BytesIO(content))
                pickled.load()
                if any(sizes.get(f"{name[:-8]}data/{key}") != size for key, size in pickled.storages.items()):
                    raise ValueError("its tensors are not what it holds")
    copy.seek(0)
    return copy


def from_pickles(file: io.BytesIO) -> io.BytesIO:
    """Five (a magic number, a version, the system, the content, the storages' keys), then the storages."""
    pickled = Audit(file)
    *_, keys = [pickled.load() for _ in range(5)]
    rest = len(file.getbuffer()) - file.tell()
    if sorted(keys) != sorted(pickled.storages) or rest != sum(8 + size for size in pickled.storages.values()):
        raise ValueError("its tensors are not what it holds")
    file.seek(0)
    return file
