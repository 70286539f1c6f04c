"""Whole training steps captured once as a CUDA graph, then replayed with one launch instead of thousands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from helper.student import Student

WARM_UP = 3  # eager steps before capture: kernels choose their algorithms, the optimizer makes its momentum


class CudaGraph:
    """Runs a step on a plan (.., batch_size), from the fourth call on by replaying its captured graph.

    A batch of another size (the short last one) is run eagerly. A new capture is made when the students change. All
    steps run on a stream of their own, as capture and the steps before it must.
    """

    def __init__(self, device: torch.device, batch_size: int):
        self.device, self.batch_size = device, batch_size
        self.students: list[Student] = []
        self.steps, self.trouble = 0, ""
        self.plan: Tensor | None = None
        self.replay: Callable[[], None] | None = None
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, step: Callable[[Tensor], None], plan: Tensor, students: list[Student]) -> None:
        if students != self.students:
            self.students, self.steps, self.plan, self.replay, self.trouble = students, 0, None, None, ""
            fixed = [s.name for s in students if s.uses_features and not s.distiller.capturable]
            if fixed:
                self.give_up(f"the step of {', '.join(fixed)} waits for the device")
        with self.on_stream():
            if self.trouble or plan.size(-1) != self.batch_size:
                step(plan)
                return
            self.plan = plan.clone() if self.plan is None else self.plan.copy_(plan)
            if self.steps == WARM_UP and not self.replay:
                try:
                    self.replay = self.capture(step)
                except RuntimeError as error:
                    self.give_up(str(error).splitlines()[0])
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

    def capture(self, step: Callable[[Tensor], None]) -> Callable[[], None]:
        """Record what a step asks of the device without doing it -> a function that does it.

        Raises RuntimeError if the step waits for the device.
        """
        graph = torch.cuda.CUDAGraph()
        generators = [g for s in self.students if s.has_term for g in s.distiller.generators()]
        before = [generator.clone_state() for generator in generators]  # a failed capture leaves them unusable
        for generator in generators if torch.__version__ < (2, 14) else ():  # later versions find them
            graph.register_generator_state(generator)
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                step(self.plan)
        except RuntimeError as error:
            for generator, state in zip(generators, before, strict=True):
                generator.graphsafe_set_state(state)
            raise RuntimeError(str(error.__context__ or error)) from error  # the first error says why
        return graph.replay
