"""A small but complete generation for fault-injection benchmarks: real images, a tiny teacher.

Units have only a few images, so that there are many units. Starting Python and torch takes seconds,
so processes to be killed are forked from one that has imported everything and started no threads.
They run the public command.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # a parallel region before the fork would block the child

import timm
import torch

from fkdpipe import cli

# Everything the children need, imported once.
from fkdpipe.commands import demo_data
from fkdpipe.networks import models, weight_files
from fkdpipe.networks.models import ModelSpec
from fkdpipe.storage import schema

UNIT_IMAGES = 4
CROPS = 8
SOURCE = "t"


@dataclass(frozen=True)
class Bench:
    """Paths of the benchmark. images: number of images in the train split."""

    data: Path
    teacher: Path
    images: int


def prepare(root: Path, *, images: int) -> Bench:
    """Write images of ten classes and a teacher with random weights to `root`."""
    demo_data.make_images(root / "data", count=images * 5 // 4)
    torch.manual_seed(0)
    module = timm.create_model("test_resnet", num_classes=10).eval()
    size = [32, 32]
    facts = {"student": "test_resnet", "size": size, "interpolation": "bilinear"}
    assert models.build(ModelSpec("test_resnet"), pretrained=False) is not None
    weight_files.write_export(root / "teacher.safetensors", module, facts)
    return Bench(
        root / "data",
        root / "teacher.safetensors",
        sum(1 for _ in (root / "data" / "train").glob("*/*.jpg")),
    )


def generate_words(bench: Bench, store: Path | str, *more: str) -> list[str]:
    """Arguments of `fkdpipe` that generate the store."""
    return [
        "generate", str(bench.data), str(store), "--teacher", f"test_resnet={bench.teacher}",
        "--source", SOURCE, "--form", "topk:5", "--crops", str(CROPS), "--batch-size", "16",
        "--device", "cpu", "--set", "threads=1", *more,
    ]  # fmt: skip


def fork(run: Callable[[], None], log: Path) -> int:
    """Run a function in a forked process with its output in `log`; return the process id.

    Exit codes are those of the command line: 0, 1 or 2.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        schema.UNIT_IMAGES = UNIT_IMAGES
        torch.set_num_threads(1)
        run()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def command(words: Sequence[str], first: Callable[[], None] = lambda: None) -> Callable[[], None]:
    """A function for `fork` that calls `first` and then runs `fkdpipe` with these arguments."""

    def run() -> None:
        first()
        sys.argv = ["fkdpipe", *words]
        cli.main()

    return run


def wait(child: int) -> int:
    """Exit code of a process, or the negative number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill(child: int, number: int = signal.SIGKILL) -> None:
    os.kill(child, number)
