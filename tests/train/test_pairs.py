"""Networks of every family as student and teacher: one step each, at tiny sizes.

The published networks at full size are in benchmarks/pairs.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from feature_maps import CLASSES, context, targets

from fkdpipe.networks import feature_layers
from fkdpipe.networks.feature_layers import FeatureNetwork
from fkdpipe.train import methods
from fkdpipe.train.learner import Learner

ROOT = Path(__file__).parents[2]
SIZE = {"encoder_depth": 1, "decoder_depth": 1, "encoder_heads": 2, "decoder_heads": 2}
DPK = {"name": "dpk", "stages": [{"stage": 1, **SIZE}, {"stage": 2, **SIZE}]}
FITNET = {"name": "fitnet", "stages": [1, 2], "soft_weight": 1.0}
SCALEKD = {"name": "scalekd"}
SRD = {"name": "srd", "form": "corr", "student": "tokens"}

PAIRS = [
    *(("swin", student, SCALEKD) for student in tiny.NETWORKS if student != "beit"),
    *((teacher, "resnet", SCALEKD) for teacher in ("swinv2", "vit", "beit")),
    ("resnet", "mobilenet", DPK),
    ("vit", "vit", DPK),
    ("swin", "resnet", DPK),
    ("convnext", "mixer", DPK),
    ("resnet", "vit", FITNET),
    ("beit", "convnext", FITNET),
    ("regnet", "deit", SRD),
]


@pytest.mark.parametrize(
    ("teacher", "student", "table"), PAIRS, ids=[f"{t}-{s}-{m['name']}" for t, s, m in PAIRS]
)
def test_one_step(teacher, student, table):
    needs = methods.needs(table)
    frozen = (
        FeatureNetwork(tiny.network(teacher, seed=1), needs.teacher).eval().requires_grad_(False)
    )
    network = FeatureNetwork(tiny.network(student), needs.student)
    size, cpu = (64, 64), torch.device("cpu")
    method = methods.build(
        table,
        context(
            feature_layers.example(network, size, cpu),
            feature_layers.example(frozen, size, cpu),
            student_network=network.network,
            teacher_network=frozen.network,
        ),
    )
    learner = Learner(network, method).train()
    pixels = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        given = frozen(pixels)
    logits_BC, terms = learner(pixels, targets(given))
    assert logits_BC.shape == (4, CLASSES)
    loss = sum(term.mean() for term in terms.values())
    loss.backward()
    assert torch.isfinite(loss)
    assert [n for n, p in learner.named_parameters() if p.grad is None] == []
    assert all(p.grad is None for p in frozen.parameters())
    assert not frozen.training


@pytest.mark.slow
def test_published_networks_of_the_quick_benchmark(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "pairs.py"), "--quick"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["pairs"] == 2
