"""Times and memory of what benchmark.py runs."""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, supported_activities

LEAST_MS = 50  # a shorter run is repeated within its round


def in_turn(sides: Sequence[Callable[[], object]], rounds: int, device: torch.device) -> list[list[float]]:
    """Milliseconds of one run in each round, of every side."""
    repeats = [max(1, round(LEAST_MS / timed(side, 1, device))) for side in sides]
    return by_turns([partial(timed, side, n, device) for side, n in zip(sides, repeats, strict=True)], rounds)


def by_turns(sides: Sequence[Callable[[], float]], rounds: int) -> list[list[float]]:
    """What each side gives in each round; what began one round ends the next."""
    values = [[] for _ in sides]
    for i in range(rounds):
        for which in range(len(sides))[:: -1 if i % 2 else 1]:
            values[which].append(sides[which]())
    return values


def timed(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Milliseconds of one run, the mean of some."""
    start = clock(device)
    for _ in range(repeats):
        run()
    return (clock(device) - start) * 1000 / repeats


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def extra_memory(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes beyond those held before, at the highest point of a run; None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed buffers that the process has kept would be used again, unseen
        Path("/proc/self/clear_refs").write_text("5")  # the highest point is from now on
    except (OSError, AttributeError, TypeError):
        run()
        return None
    before = resident("VmRSS")
    run()
    return max(0, resident("VmHWM") - before)


def resident(key: str) -> int:
    """Bytes of this process in memory: now (VmRSS), at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def kernels(
    run: Callable[[], object], repeats: int, device: torch.device, of: ProfilerActivity = ProfilerActivity.CUDA
) -> tuple[float, float] | None:
    """Of one run, the mean of some: kernels and copies, milliseconds in which at least one is at work.

    None where the profiler does not see them: without a GPU, or where its driver does not let it.
    """
    if device.type != of.name.lower() or of not in supported_activities():
        return None
    run()  # loader workers start here
    with profile(activities=[of]) as seen:
        timed(run, repeats, device)
    n, ms = at_work(seen.events(), getattr(DeviceType, of.name))
    return (n / repeats, ms / repeats) if n else None


def at_work(events: Iterable, kind: DeviceType) -> tuple[int, float]:
    """Number of a profiler's events on a kind of device, and the milliseconds in which at least one goes on."""
    own = (e for e in events if e.device_type == kind and not getattr(e, "is_user_annotation", False))
    total, until = 0.0, -math.inf
    ranges = sorted((e.time_range.start, e.time_range.end) for e in own)
    for start, end in ranges:
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return len(ranges), total / 1000
