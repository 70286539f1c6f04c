"""One run over the processes that torchrun started, each with a share of every batch.

A process weighs the mean loss of its share by the share's size, so gradients add up to those of the whole batch. What
one process sees alone (a signal, a student that is no longer finite) all must act on at the same step, or they would
wait for each other forever. Without torchrun there is one process, and nothing here has any effect.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from models.util import ModelError

TIMEOUT = timedelta(days=1)  # the others wait while one decodes a data set; torchrun notices a process that has died


class Lost(Exception):
    """Another process of the run has ended."""


class Ranks:
    """This process among those of the run. The first, rank 0, prints and writes; all read."""

    def __init__(self) -> None:
        self.rank = self.local_rank = 0
        self.world = 1
        self.sizes = [1]  # images that each rank has of the present batch
        self.store: dist.Store | None = None

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Take part in the run for which torchrun, if it is there, has started this process."""
        streams = sys.stdout, sys.stderr
        if dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1:
            self.local_rank = int(os.environ["LOCAL_RANK"])
            store, self.rank, self.world = next(dist.rendezvous("env://"))
            self.store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)  # it outlives --max-restarts
        try:
            yield
        finally:
            sys.stdout, sys.stderr = streams

    def start(self, device: torch.device) -> None:
        """Connect with the others; from here on only the first process prints."""
        if self.world == 1:
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # gloo beside NCCL: what the hosts agree on need not wait for the devices
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=self.store, rank=self.rank, world_size=self.world, timeout=TIMEOUT)
        if self.rank:
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 open until the process ends

    def leave(self, code: int) -> int:
        """End a process of several at once: threads of torch.distributed may abort one that shuts down in order."""
        if self.world > 1:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        return code

    def is_first_to_fail(self) -> bool:
        """Whether no other process has said yet why the run ends."""
        try:
            return self.store is None or self.store.add("failed", 1) == 1
        except RuntimeError:  # torchrun itself is gone
            return True

    def call(self, collective: Callable, *args: Any) -> None:
        """Do what all processes do together. Raises Lost if one is gone."""
        if self.world > 1:
            try:
                collective(*args)
            except RuntimeError as error:
                reason = str(error).rpartition("] ")[2].split(". ")[0]  # without gloo's file and line, and its advice
                raise Lost(f"another process of this run has ended ({reason})") from error

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        self.call(dist.all_reduce, x)
        return x

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank. Hosts wait for each other, not for their devices."""
        return bool(self.sum(torch.tensor(int(flag)))) if self.world > 1 else flag

    @contextmanager
    def after(self, first: bool) -> Iterator[None]:
        """Let the processes that are `first` do this before the others."""
        if not first:
            self.any(False)
        yield
        if first:
            self.any(False)

    def share_buffers(self, model: nn.Module) -> None:
        """Give every rank the batch statistics of the first one."""
        for buffer in model.buffers():
            self.call(dist.broadcast, buffer, 0)

    def split(self, size: int) -> None:
        """Note the shares of the next batch, which are those of `dataset.loader.share_of`."""
        self.sizes = [size // self.world + (rank < size % self.world) for rank in range(self.world)]

    @property
    def weight(self) -> float:
        """This rank's share of the batch, between 0 and 1."""
        return self.sizes[self.rank] / sum(self.sizes)

    def gather(self, x: Any) -> Any:
        """The whole batch (B, ...), with gradients, of which x is this rank's part; also of lists and dicts."""
        if isinstance(x, dict):
            return {key: self.gather(value) for key, value in x.items()}
        return [self.gather(value) for value in x] if isinstance(x, list) else Gather.apply(x)

    @torch.no_grad()
    def add_up(self, grads: list[Tensor], terms: Tensor, hits: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients (in place; the loss was weighted), terms and hits of the whole batch, by a single all-reduce."""
        parts = [*grads, terms * self.weight, hits.to(terms.dtype)]
        flat = self.sum(torch.cat([part.flatten() for part in parts]))
        for part, total in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
            part.copy_(total.view(part.shape))
        return parts[-2], parts[-1]


ranks = Ranks()


class Gather(torch.autograd.Function):
    """The batch of all ranks, in order. All compute the same loss from it, weighted by their shares, so that a rank
    knows the gradient of its part without asking the others."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        whole = x.new_zeros(sum(ranks.sizes), *x.shape[1:])  # a sum, as all_gather takes no shares of unequal size
        whole.split(ranks.sizes)[ranks.rank].copy_(x)
        return ranks.sum(whole)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad.split(ranks.sizes)[ranks.rank] / ranks.weight


class Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return ranks.sum(x.clone())

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return ranks.sum(grad.clone(memory_format=torch.contiguous_format))


class SyncBatchNorm(nn.SyncBatchNorm):
    """Batch norm over the shares of all ranks on the CPU, where PyTorch's does not run."""

    def forward(self, x: Tensor) -> Tensor:  # (B, C, ...)
        if not self.training:
            return super().forward(x)
        dims, shape, dtype = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2), x.dtype
        x = x.to(self.running_mean.dtype)  # bfloat16 has too few digits for sums
        n = round(x.numel() / x.size(1) / ranks.weight)  # values of a channel, on all ranks
        mean = Sum.apply(x.sum(dims)) / n
        x = x - mean.view(shape)
        var = Sum.apply(x.square().sum(dims)) / n
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (n / (n - 1)), self.momentum)
        x = x * (var + self.eps).rsqrt().view(shape)
        return (x * self.weight.view(shape) + self.bias.view(shape) if self.affine else x).to(dtype)


def sync_batch_norm(model: nn.Module, device: torch.device) -> None:
    """Let batch norm average over the shares of all ranks. Raises ModelError for an unknown kind of it.

    In place, as PyTorch's own conversion would lose hooks, and the activation that is a part of timm's batch norm.
    """
    for module in model.modules():
        if isinstance(module, BatchNorm):
            kind: type = SyncBatchNorm if device.type == "cpu" else nn.SyncBatchNorm
            if type(module).__module__.startswith("timm."):
                from timm.layers import SyncBatchNormAct

                kind = type("SyncBatchNormAct", (SyncBatchNormAct, kind), {})
            elif type(module).__module__ != BatchNorm.__module__:
                raise ModelError(f"--sync_bn: {type(module).__name__} is a batch norm of the network's own")
            module.__class__, module.process_group = kind, None
