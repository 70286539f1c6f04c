"""Whole training steps captured once as a CUDA graph, then replayed with one launch instead of thousands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from helper.student import Student

WARM_UP = 3  # eager steps before capture: kernels choose their algorithms, the optimizer makes its momentum

Plan = Tensor | tuple[Tensor, ...]


class CudaGraph:
    """Runs a step on a loader's plan of batch_size images, from the fourth call on by replaying its graph.

    A batch of another size (the short last one) is run eagerly. A new capture is made when the students change. All
    steps run on a stream of their own, as capture and the steps before it must.
    """

    def __init__(self, device: torch.device, batch_size: int):
        self.device, self.batch_size = device, batch_size
        self.students: list[Student] = []
        self.steps, self.trouble = 0, ""
        self.plan: Plan | None = None
        self.replay: Callable[[], None] | None = None
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, step: Callable[[Plan], None], plan: Plan, students: list[Student]) -> None:
        if students != self.students:
            self.students, self.steps, self.plan, self.replay, self.trouble = students, 0, None, None, ""
            fixed = [s.name for s in students if s.uses_features and not s.distiller.capturable]
            if fixed:
                self.give_up(f"the step of {', '.join(fixed)} waits for the device")
        with self.on_stream():
            if self.trouble or plan[0].size(-1) != self.batch_size:
                step(plan)
                return
            parts = plan if isinstance(plan, tuple) else (plan,)
            if self.plan is None:  # on the device, where a streamed plan is not yet
                kept = tuple(torch.empty_like(part, device=self.device) for part in parts)
                self.plan = kept if isinstance(plan, tuple) else kept[0]
            for part, new in zip(self.plan if isinstance(plan, tuple) else (self.plan,), parts, strict=True):
                part.copy_(new, non_blocking=True)
            if self.steps == WARM_UP and not self.replay:
                self.replay = self.capture(step)
            self.steps += 1
            self.replay() if self.replay else step(self.plan)

    def give_up(self, reason: str) -> None:
        self.trouble = reason
        print(f"steps are not captured as a CUDA graph: {reason}")

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        """The stream of all steps, in order with the current one."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)

    def capture(self, step: Callable[[Plan], None]) -> Callable[[], None] | None:
        """Record what a step asks of the device without doing it -> a function that does it.

        None if the step cannot be captured, as one that waits for the device. Raises torch.OutOfMemoryError.
        """
        graph = torch.cuda.CUDAGraph()
        own = [g for s in self.students if s.has_term for g in s.distiller.generators()]
        generators = [*own, *torch.cuda.default_generators]
        before = [generator.clone_state() for generator in generators]
        try:
            for generator in own if torch.__version__ < (2, 14) else ():  # later versions find them
                graph.register_generator_state(generator)
            # thread_local: meanwhile a DataLoader's thread may pin the next batches
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                step(self.plan)
        except RuntimeError as error:
            first = error
            while first.__context__:  # ending the capture fails, too; the first error says why
                first = first.__context__
            # up to torch 2.11 they would refuse to draw, as if still captured
            for generator, state in zip(generators, before, strict=True):
                generator.graphsafe_set_state(state)
            if isinstance(first, torch.OutOfMemoryError):
                raise first from None
            self.give_up(str(first).partition("\n")[0])
            return None
        return graph.replay
