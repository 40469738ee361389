"""ScaleKD from stored maps: the losses of the live teacher, of which only the tail runs."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from conftest import CLASSES
from pipeline import CPU, make_store, prepare_run, train_settings

from fkdpipe.common.errors import FkdpipeError, StoreError, StoreMismatchError, UsageError
from fkdpipe.labelgen import check
from fkdpipe.networks import features, models, teachers, weight_files
from fkdpipe.networks.feature_layers import needs_of
from fkdpipe.storage import features as codes
from fkdpipe.train import loop, stored
from fkdpipe.train import step as steps
from fkdpipe.train.methods.scalekd import without_mean
from fkdpipe.train.settings import MixingSettings

SIDE = 64


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Tiny networks: threads would wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_teacher(file, *, seed=0) -> str:
    name, extra, side = tiny.NETWORKS["swin"]
    facts = {"student": name, "options": extra, "size": [side, side]}
    weight_files.write_export(file, tiny.network("swin", classes=len(CLASSES), seed=seed), facts)
    return f"{name}={file}"


def load(text: str):
    (teacher,) = teachers.load_teachers(
        [models.parse_spec(text)], class_names=CLASSES, device=CPU, needs=needs_of({"map"})
    )
    return teacher


@pytest.fixture(scope="module")
def swin(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher") / "swin.safetensors")


@pytest.fixture(scope="module")
def stores(tmp_path_factory, folder, swin):
    """By code of the map."""
    place = tmp_path_factory.mktemp("stores")
    return {
        code: make_store(
            place / code, folder, [load(swin)], form="full", features=("map",), features_code=code
        )
        for code in ("float16", "int8")
    }


@pytest.fixture
def prepare(tmp_path, folder, swin, stores):
    """prepare(name, target, **changes of the run) -> run."""

    def make(name, target, *, store=stores["float16"], method=(), **changes):
        wanted = train_settings(
            **{
                "size": SIDE, "target": "full", "teacher": swin,
                "method": {"name": "scalekd", "target": target, **dict(method)}, **changes,
            }
        )  # fmt: skip
        return prepare_run(tmp_path / name, folder, store, wanted)

    return make


@pytest.fixture
def calls(swin, monkeypatch):
    """How often a Swin's stem and its last stage have run."""
    network = tiny.network("swin")
    counted = {"stem": 0, "stage": 0}

    def count(name, kind):
        whole = kind.forward

        def forward(self, *args, **kwargs):
            counted[name] += 1
            return whole(self, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", forward)

    count("stem", type(network.patch_embed))
    count("stage", type(network.layers[-1]))
    return counted


def terms_of(run, batch):
    return run.learner(*steps.prepare(run, batch))[1]


def assert_near(live, live_batch, stored, stored_batch):
    """A place's vector moves by 2^-11 of its length, a squared distance of unit vectors by at most
    4 times that. Without the map's mean, which moves too, vectors are shorter by `longer`."""
    pixels, wanted = steps.prepare(live, live_batch)
    ours, theirs = live.learner(pixels, wanted)[1], terms_of(stored, stored_batch)
    map_BCHW = wanted.teacher.final
    lengths = [m.norm(dim=1).flatten(1) for m in (map_BCHW, without_mean(map_BCHW))]
    longer_B = lengths[0].max(dim=1).values / lengths[1].min(dim=1).values
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        share_B = 2 * longer_B if "frequency" in name else torch.ones(len(value))
        assert ((value - theirs[name]).abs() <= 4 * 3.92 * 2**-11 * share_B).all(), name


def test_a_stored_map_is_the_teachers_within_the_codes_bound(prepare, stores):
    live = prepare("live", "live")
    for code, store in stores.items():
        stored = prepare(code, "stored", store=store)
        for a, b in zip(live.crops.stream(), stored.crops.stream(), strict=True):
            exact = steps.prepare(live, a)[1].teacher.final
            kept = steps.prepare(stored, b)[1].teacher.final
            assert kept.shape == exact.shape
            assert kept.shape[1:] == (192, 2, 2)
            largest = exact.abs().flatten(1).max(dim=1).values[:, None, None, None]
            assert ((kept - exact).abs() <= codes.error_bound(code) * largest + 1e-5).all()


def test_losses_are_those_of_the_live_teacher_batch_by_batch(prepare):
    live, stored = prepare("live", "live"), prepare("stored", "stored")
    batches = 0
    for a, b in zip(live.crops.stream(), stored.crops.stream(), strict=True):
        assert_near(live, a, stored, b)
        batches += 1
    assert batches > 2


def test_the_teachers_stem_never_runs_and_its_tail_does(prepare, calls):
    stored = prepare("stored", "stored")
    assert stored.teacher is None
    loop.train(stored)
    assert calls["stem"] == 0
    assert calls["stage"] == 2 * stored.steps  # one for each proxy path
    live = prepare("live", "live")
    terms_of(live, next(iter(live.crops.stream())))
    assert calls["stem"] > 0


def test_gradients_reach_everything_trained_and_nothing_of_the_teacher(prepare):
    run = prepare("stored", "stored")
    network = run.method.tail.network
    before = {name: value.clone() for name, value in network.state_dict().items()}
    steps.step(run, next(iter(run.crops.stream())))
    assert all(p.grad is not None for p in run.learner.parameters())
    assert all(p.grad is None and not p.requires_grad for p in network.parameters())
    assert not any(part.training for part in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_without_the_proxy_path_no_teacher_is_needed_nor_taken(prepare):
    alone = prepare("alone", "stored", method={"tpp": False}, teacher=None)
    beside = prepare("beside", "live", method={"tpp": False})
    a, b = (next(iter(run.crops.stream())) for run in (alone, beside))
    assert_near(beside, b, alone, a)
    with pytest.raises(UsageError, match="does not use --teacher"):
        prepare("given", "stored", method={"tpp": False})
    with pytest.raises(UsageError, match="needs a live teacher"):
        prepare("none", "stored", teacher=None)


def test_another_teacher_or_size_is_refused_by_name(prepare, tmp_path, stores, swin):
    other = write_teacher(tmp_path / "other.safetensors", seed=1)
    with pytest.raises(StoreMismatchError, match="differs from the live teacher in weights"):
        prepare("weights", "stored", teacher=other)
    kept = stores["float16"].part("rounds/0/features/t/map").settings
    facts = load(swin).facts()
    stored.check_teacher(kept, facts)
    with pytest.raises(StoreMismatchError, match="differs from the live teacher in size"):
        stored.check_teacher(kept, {**facts, "size": [128, 128]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"store": None, "target": "ground-truth"}, "STORE made with --features[.]"),
        ({"target": "ground-truth"}, "a --target other than ground-truth[.]"),
        ({"mixing": MixingSettings(mixup=0.2)}, "stored features are of unmixed images"),
    ],
)
def test_what_a_store_cannot_serve_is_refused(tmp_path, folder, swin, stores, changes, message):
    store = changes.pop("store", stores["float16"])
    method = {"name": "scalekd", "target": "stored"}
    wanted = train_settings(**{"size": SIDE, "teacher": swin, "method": method, **changes})
    with pytest.raises(UsageError, match=message):
        prepare_run(tmp_path / "run", folder, store, wanted)


def test_a_store_without_maps_is_refused(prepare, tmp_path, folder, swin):
    store = make_store(tmp_path / "labels", folder, [load(swin)], form="full")
    with pytest.raises(StoreError, match="features"):
        prepare("run", "stored", store=store)


def test_a_map_has_no_components_and_stands_beside_the_labels(stores, folder, swin):
    assert features.parse_features("map") == ("map", None)
    with pytest.raises(FkdpipeError, match="stored whole"):
        features.parse_features("map:512")
    store = stores["float16"]
    part = store.part("rounds/0/features/t/map")
    assert part.settings.shape == (192, 2, 2)
    assert part.settings.dims == np.prod(part.settings.shape)
    checked = check.teacher(store, part, folder, [load(swin)], device=CPU)
    assert checked.crops
    assert not checked.problems
