"""Time, memory and kernels of what benchmark.py runs. The clock of torch.utils.benchmark waits for the device."""

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, supported_activities
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer, timer

# what only allocates or renames
FREE = {f"aten::{name}" for name in ("empty", "empty_like", "new_empty", "empty_strided", "_unsafe_view", "lift_fresh")}


def interleaved(sides: Sequence[Callable[[], float]], rounds: int) -> list[list[float]]:
    """What each side returns in each round; the side that began one round ends the next."""
    values = [[] for _ in sides]
    for i in range(rounds):
        for which in range(len(sides))[:: -1 if i % 2 else 1]:
            values[which].append(sides[which]())
    return values


def milliseconds(sides: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Of one run of each side in each round; short runs are repeated."""
    timers = [Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads()) for run in sides]
    return interleaved([lambda t=t: 1000 * t.blocked_autorange(min_run_time=0.05).median for t in timers], rounds)


def timed(run: Callable[[], object], repeats: int) -> float:
    """Milliseconds of one run, the mean of some without a warm-up."""
    start = timer()
    for _ in range(repeats):
        run()
    return (timer() - start) * 1000 / repeats


def extra_memory(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes at the highest point of a run beyond those held before; None where the system does not tell."""
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


def kernels(run: Callable[[], object], repeats: int, device: torch.device) -> tuple[float, float] | None:
    """Kernels and copies of one run, and the milliseconds they take; None where the profiler does not see them."""
    if device.type != "cuda" or ProfilerActivity.CUDA not in supported_activities():
        return None
    run()  # loader workers start here
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        timed(run, repeats)
    events = [e for e in seen.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    return (len(events) / repeats, sum(e.time_range.elapsed_us() for e in events) / 1000 / repeats) if events else None


class Operators(TorchDispatchMode):
    """Counts the operators that compute something: neither views nor what only allocates. Convolutions apart."""

    def __init__(self):
        super().__init__()
        self.convolutions = self.others = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if "convolution" in name:
            self.convolutions += 1 + (name.endswith("_backward") and sum(args[-1][:2]) == 2)  # of images and of weights
        elif name.startswith("aten::") and not func.is_view and name not in FREE:
            self.others += 1
        return func(*args, **(kwargs or {}))
