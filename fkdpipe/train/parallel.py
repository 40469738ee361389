"""Several processes training one student: torch's own process group, DDP and collectives.

`torchrun` starts the processes and says who is who. Without it everything here does nothing.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from fkdpipe.common.distributed import Rank
from fkdpipe.common.errors import UsageError
from fkdpipe.train.learner import Learner
from fkdpipe.train.settings import TrainSettings

# Processes meet while one of them may still be copying labels to its node's cache.
TIMEOUT = timedelta(hours=2)


@contextlib.contextmanager
def group(rank: Rank, device: torch.device) -> Iterator[None]:
    """The process group of a run: nccl on GPUs, gloo on CPUs."""
    if rank.world == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def check(settings: TrainSettings, device: torch.device) -> None:
    """Raises UsageError where torch.compile or synchronised batch norm cannot work."""
    if settings.sync_batchnorm and device.type != "cuda":
        raise UsageError(
            "sync_batchnorm works on GPUs only; on the CPU each process has its own statistics."
        )
    if settings.compile is not None:
        _check_compiler(settings.compile, device)


def wrap(learner: Learner, settings: TrainSettings, rank: Rank, device: torch.device) -> nn.Module:
    """What is called in a step: the learner, in DDP with several processes, compiled if asked."""
    if settings.sync_batchnorm:
        learner.student.network = nn.SyncBatchNorm.convert_sync_batchnorm(learner.student.network)
    wrapped: nn.Module = learner
    if rank.world > 1:
        wrapped = DistributedDataParallel(
            learner,
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )
    if settings.compile is not None:
        wrapped.compile(backend=settings.compile)
    return wrapped


def _check_compiler(backend: str, device: torch.device) -> None:
    known = torch._dynamo.list_backends(exclude_tags=())
    if backend not in known:
        raise UsageError(f"compile: torch has no backend {backend!r}; it has {', '.join(known)}.")
    compilers = ("g++", "clang++", "c++") if device.type == "cpu" else ("gcc", "clang", "cc")
    if backend == "inductor" and not any(shutil.which(name) for name in compilers):
        raise UsageError(
            f"compile = inductor needs a compiler ({' or '.join(compilers)}); none is found here. "
            "Install one, or leave compile out."
        )


@contextlib.contextmanager
def local_first(rank: Rank, device: torch.device) -> Iterator[None]:
    """The first process of each machine does it, then the others: the one that copies labels to
    the machine's cache is then also the one that tells how far it is."""
    if rank.local:
        total([0.0], rank, device)
    yield
    if not rank.local:
        total([0.0], rank, device)


def quiet(wrapped: nn.Module, *, last: bool) -> contextlib.AbstractContextManager:
    """Gradients of all but the last part of a step are not exchanged yet."""
    if isinstance(wrapped, DistributedDataParallel) and not last:
        return wrapped.no_sync()
    return contextlib.nullcontext()


def total(values: Sequence[float] | torch.Tensor, rank: Rank, device: torch.device) -> torch.Tensor:
    """float64 sums over all processes."""
    summed = torch.as_tensor(values, dtype=torch.float64).to(device)
    if rank.world > 1:
        distributed.all_reduce(summed)
    return summed.cpu()
