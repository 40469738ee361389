"""The throughput benchmark can be tried without the GPU that it is for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def bench(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "throughput.py"), *words],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_its_trial_runs_on_the_cpu():
    done = bench("--quick", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert min(found["generation_vs_forward"], found["training_vs_synthetic"]) > 0
    assert 0 < found["wait_share"] < 1


@pytest.mark.slow
def test_without_a_gpu_it_says_so():
    done = bench()
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
