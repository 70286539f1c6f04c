"""Whole training steps recorded once as a CUDA graph, then run with one launch instead of thousands."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

WARM_UP = 3  # steps before recording: kernels choose their algorithms, the optimizer makes its momentum


class CudaGraphs:
    """Where steps are recorded: on a stream of its own, as autograd asks of a recording and of the steps before."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)

    def beside(self) -> AbstractContextManager:
        """The stream, after all that has been asked of the device."""
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        return torch.cuda.stream(self.stream)

    def join(self) -> None:
        """Let what comes next wait for the stream."""
        torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    def record(self, run: Callable[[], None], generators: list[torch.Generator]) -> Callable[[], None]:
        """Record what `run` asks of the device, without doing it; -> a function that does it.

        Raises RuntimeError if it waits for the device.
        """
        graph = torch.cuda.CUDAGraph()
        before = [generator.clone_state() for generator in generators]  # a recording that fails leaves them unusable
        for generator in generators:
            graph.register_generator_state(generator)
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                run()
        except RuntimeError as error:
            for generator, state in zip(generators, before, strict=True):
                generator.graphsafe_set_state(state)
            raise RuntimeError(str(error.__context__ or error)) from error  # the first error says why
        return graph.replay


class RecordedStep:
    """Runs a step for inputs (.., width) as a recording, and for others (a short last batch) as it is.

    backend: what records, see CudaGraphs; trouble: why nothing can be recorded, if that is known
    """

    def __init__(
        self,
        run: Callable[[Tensor], None],
        width: int,
        generators: list[torch.Generator],
        backend: CudaGraphs,
        trouble: str = "",
    ):
        self.run, self.width, self.generators, self.backend = run, width, generators, backend
        self.steps, self.input, self.replay = 0, None, None
        self._say(trouble)

    def _say(self, trouble: str) -> None:
        self.trouble = trouble
        if trouble:
            print(f"steps are not recorded as a graph: {trouble}")

    def __call__(self, given: Tensor) -> None:
        with self.backend.beside():
            if self.trouble or given.size(-1) != self.width:
                self.run(given)
            else:
                self._step(given)
        self.backend.join()

    def _step(self, given: Tensor) -> None:
        self.input = given.clone() if self.input is None else self.input.copy_(given)
        if self.steps == WARM_UP and not self.replay:
            try:
                self.replay = self.backend.record(lambda: self.run(self.input), self.generators)
            except RuntimeError as error:
                self._say(str(error).splitlines()[0])
        self.steps += 1
        if self.replay:
            self.replay()
        else:
            self.run(self.input)
