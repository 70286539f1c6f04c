"""Whole steps recorded once as a CUDA graph, then run with one launch instead of thousands; tracks side by side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
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


def in_turn(tracks: Sequence, update: Callable) -> None:
    """Update tracks one after another, on the current stream."""
    for track in tracks:
        update(track)


class CudaStreams:
    """Updates tracks side by side: each on a stream of its own, from all that was asked of the current one to its next.

    Freed memory is used again on its own stream alone. So what the current stream has made must be held until the end,
    and a track keeps its stream: what it frees of an earlier step is not written to by one beside it.
    """

    def __init__(self, device: torch.device):
        self.device, self.streams = device, defaultdict(lambda: torch.cuda.Stream(device))

    def __call__(self, tracks: Sequence, update: Callable) -> None:
        if len(tracks) == 1:
            return in_turn(tracks, update)
        current = torch.cuda.current_stream(self.device)
        streams = [self.streams[track.name] for track in tracks]
        for stream in streams:
            stream.wait_stream(current)
        for track, stream in zip(tracks, streams, strict=True):
            with torch.cuda.stream(stream):
                update(track)
        for stream in streams:
            current.wait_stream(stream)


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
