"""Seeds, devices and what a user is told when a run cannot be done."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch

from dataset import DataError
from distiller_zoo import DistillError
from helper.interrupt import EXIT, IN_USE, Interrupted, interrupt
from helper.ranks import Lost, ranks
from models.util import ModelError


class RunError(ValueError):
    """A run cannot be started or go on; the message is one sentence for the user."""


class InUse(RunError):
    """Another process writes into the folder."""


def cli_errors(main: Callable[[], object]) -> int:
    """Call `main` as a script does -> its exit code. What cannot be done ends in one sentence, not in a traceback."""

    def say(what: object) -> None:
        if not ranks.is_first_to_fail():
            return
        line = "".join(c if c.isprintable() else " " for c in str(what))  # text of a damaged file may be in it
        print(f"{Path(sys.argv[0]).name}: {line:.5000}", file=sys.stderr)

    try:
        try:
            interrupt.listen()
            with ranks.joined():
                results = main()
            code = 1 if isinstance(results, list) and any(result.failed for result in results) else 0
        except BrokenPipeError:  # as of `| head`: the reader is gone; nothing may be left to flush
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 128 + signal.SIGPIPE
        except (RunError, DataError, DistillError, ModelError, OSError) as error:  # OSError: a full disk, for one
            say(error)
            code = IN_USE if isinstance(error, InUse) else 2
        except (torch.OutOfMemoryError, MemoryError) as error:
            asked = re.search(r"Tried to allocate (.+?)\. .*capacity of (.+?) of which (.+?) is free", str(error))
            what = str(error).partition("\n")[0]
            if asked:
                what = "{0} were asked for, {2} of {1} are free".format(*asked.groups())
            say(f"out of memory, try a smaller --batch_size or fewer methods in one call ({what})")
            code = 2
        except Lost as error:
            say(f"{error}: stopped; the same command continues the run from its last saved state")
            code = EXIT
        except KeyboardInterrupt:
            say("interrupted")
            code = 130
        finally:
            interrupt.forget()
    except Interrupted as error:  # at any moment, so around all else
        say(f"{error}: stopped; the same command continues the run")
        code = EXIT
    return ranks.leave(code)


def stream(seed: int, *key: str) -> int:
    """Seed of a named stream of random numbers; 32 bits are all that torch's CPU generator uses."""
    return zlib.crc32("/".join((str(seed), *key)).encode())


def seed_all(seed: int, *key: str) -> None:
    """Seed the global generators, for the modules that are initialised next."""
    torch.manual_seed(stream(seed, *key))


def choose_device(name: str) -> torch.device:
    """auto: the GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RunError(f"--device {name}: choose auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise RunError(f"--device {name}: choose auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RunError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices for this torch")
    return device


def keep_buffers() -> None:
    """Let glibc keep freed buffers of any size, where there is glibc. It would return those of large batches to the
    kernel, which fills them with zeros again at the next use: validation takes 1.7 times as long."""
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        for option in (-1, -3):  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
            mallopt(option, 2**31 - 1)


def has_native_bf16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16, not only stores it."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def versions() -> dict[str, str]:
    """Versions of the packages that affect results."""
    found = {"python": sys.version.split()[0], "torch": torch.__version__}
    for package in ("torchvision", "numpy", "scipy", "scikit-learn", "pillow"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def code_version() -> str:
    """Commit of this checkout, with '+' if files differ from it; 'unknown' outside of git."""
    root = Path(__file__).resolve().parent.parent
    try:
        git = functools.partial(subprocess.run, cwd=root, capture_output=True, text=True, check=True, timeout=10)
        commit = git(["git", "rev-parse", "--short=12", "HEAD"]).stdout.strip()
        return commit + ("+" if git(["git", "status", "--porcelain"]).stdout.strip() else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
