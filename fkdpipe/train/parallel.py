"""Multi-process training with torch's process group, DDP and collectives.

`torchrun` starts the processes and sets their ranks. In a single process, all of this is a no-op.
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

# Long enough for one process to fill its node's label cache while the others wait.
TIMEOUT = timedelta(hours=2)


@contextlib.contextmanager
def group(rank: Rank, device: torch.device) -> Iterator[None]:
    """The process group of a run: NCCL on GPUs, Gloo on CPUs."""
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
    """Raise UsageError if torch.compile or synchronised batch norm cannot work."""
    if settings.sync_batchnorm and device.type != "cuda":
        raise UsageError(
            "sync_batchnorm needs GPUs; on the CPU, each process has its own statistics."
        )
    if settings.compile is not None:
        _check_compiler(settings.compile, device)


def wrap(learner: Learner, settings: TrainSettings, rank: Rank, device: torch.device) -> nn.Module:
    """Wrap the learner in DDP if there are several processes, and compile it if configured."""
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
            f"compile = inductor needs a compiler ({' or '.join(compilers)}); none was found. "
            "Install one, or leave compile out."
        )


@contextlib.contextmanager
def local_first(rank: Rank, device: torch.device) -> Iterator[None]:
    """Run the block in the first process of each machine, then in the others. The first one fills
    the machine's label cache and reports its progress."""
    if rank.local:
        total([0.0], rank, device)
    yield
    if not rank.local:
        total([0.0], rank, device)


def quiet(wrapped: nn.Module, *, last: bool) -> contextlib.AbstractContextManager:
    """Skip gradient synchronisation for all but the last part of a step."""
    if isinstance(wrapped, DistributedDataParallel) and not last:
        return wrapped.no_sync()
    return contextlib.nullcontext()


def total(values: Sequence[float] | torch.Tensor, rank: Rank, device: torch.device) -> torch.Tensor:
    """float64 sums over all processes."""
    sums = torch.as_tensor(values, dtype=torch.float64).to(device)
    if rank.world > 1:
        distributed.all_reduce(sums)
    return sums.cpu()
