"""Replay: the same pixels whatever the company, in both backends; and close to Pillow."""

from __future__ import annotations

import errno
import gc
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import pillow_crop
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from fkdpipe.common.errors import ImagesError, ReplayError, UsageError
from fkdpipe.networks.models import Preprocessing
from fkdpipe.pixels import crops, images, replay
from fkdpipe.pixels.crops import CropDistribution
from fkdpipe.pixels.replay import Replay, Request, View, cpu, open_replay

BACKENDS = ("cpu", "dali")
WITH_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ON_GPU = pytest.param("dali on cuda", marks=[pytest.mark.gpu, WITH_CUDA])
VIEWS = (View((32, 32)), View((40, 28), "bicubic"))
M = 5


@pytest.fixture(scope="module")
def everything(scanned) -> Request:
    """All images of the folder, odd kinds included, with M crops each."""
    drawn = crops.sample(
        CropDistribution(),
        seed=11,
        image_id_N=crops.image_ids(scanned.keys),
        size_N2=scanned.size_N2,
        crops_M=np.arange(M),
    )
    return Request(
        paths=[images.path_of(scanned.root, key) for key in scanned.keys],
        size_I2=scanned.size_N2,
        box_Im4=drawn.box_NM4,
        flip_Im=drawn.flip_NM,
    )


def some(request: Request, rows, which=slice(None)) -> Request:
    rows = list(rows)
    return Request(
        paths=[request.paths[k] for k in rows],
        size_I2=request.size_I2[rows],
        box_Im4=request.box_Im4[rows][:, which],
        flip_Im=request.flip_Im[rows][:, which],
        tag=rows,
    )


def decoded_by_pillow(path: bytes) -> torch.Tensor:
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


@pytest.fixture(scope="module", params=BACKENDS)
def made(request, everything):
    """(backend, pixels of every crop and view)."""
    return request.param, at_once(open_replay(request.param, VIEWS), everything)


@pytest.fixture(scope="module", params=[*BACKENDS, ON_GPU])
def anywhere(request, everything):
    """(how to open the backend, pixels of every crop and view), on a GPU too."""
    backend, _, device = request.param.partition(" on ")
    opened = partial(open_replay, backend, device=torch.device(device or "cpu"))
    return opened, at_once(opened(VIEWS), everything)


def at_once(replayer: Replay, request: Request) -> list[torch.Tensor]:
    with replayer:
        (pixels,) = replayer.run([request])
    assert not pixels.failures
    return [view.clone() for view in pixels.views]


@pytest.mark.parametrize(("threads", "prefetch"), [(1, 1), (3, 4)])
def test_pixels_do_not_depend_on_company_order_batch_m_or_threads(
    anywhere, everything, threads, prefetch
):
    """On a GPU nvJPEG is pinned to its CUDA decoder (hw_decoder_load 0), see below."""
    opened, whole = anywhere
    count = len(everything.paths)
    shuffled = np.random.default_rng(threads).permutation(count).tolist()
    requests = [some(everything, shuffled[k : k + 7]) for k in range(0, count, 7)]
    requests += [some(everything, [k], slice(2, 3)) for k in range(count)]
    requests += [some(everything, range(count), slice(1, 4))]
    with opened(VIEWS, threads=threads, prefetch=prefetch) as replayer:
        for pixels in replayer.run(requests):
            first = {1: 2, 3: 1}.get(pixels.request.box_Im4.shape[1], 0)
            m = pixels.request.box_Im4.shape[1]
            for view, ours in zip(whole, pixels.views, strict=True):
                expected = view.unflatten(0, (count, M))[pixels.request.tag]
                assert torch.equal(ours.unflatten(0, (-1, m)), expected[:, first : first + m])


def test_a_view_does_not_depend_on_other_views(anywhere, everything):
    opened, whole = anywhere
    (alone,) = at_once(opened(VIEWS[1:]), everything)
    assert torch.equal(alone, whole[1])


@pytest.mark.gpu
@WITH_CUDA
def test_with_dalis_default_split_pixels_depend_on_company(everything):
    """Why hw_decoder_load is pinned: by default a share of each batch goes to the hardware decoder,
    whose pixels differ from the CUDA decoder's."""
    from fkdpipe.pixels.replay.dali import DaliReplay

    split = partial(
        DaliReplay, VIEWS[:1], threads=2, prefetch=2, device=torch.device("cuda"),
        hw_decoder_load=0.65,
    )  # fmt: skip
    count = len(everything.paths)
    (together,) = at_once(split(), everything)
    alone = torch.cat([at_once(split(), some(everything, [k]))[0] for k in range(count)])
    if torch.equal(together, alone):
        pytest.skip("this GPU has no hardware JPEG decoder, or one with the same pixels")
    differ = (together != alone).unflatten(0, (count, M)).flatten(1).any(1)
    assert not differ.all()  # odd kinds of files never go to the hardware decoder


@pytest.mark.parametrize("view", range(2))
def test_pixels_are_close_to_pillow(made, everything, view):
    """Bounds measured for the kernels; DALI repeats the edge pixel where Pillow renormalises the
    filter, so its outer ring is compared apart."""
    backend, whole = made
    kind = VIEWS[view].interpolation
    ours = whole[view].permute(0, 2, 3, 1).numpy().astype(int)
    worst, worst_inside, total = 0, 0, 0.0
    for row in range(len(ours)):
        image, crop = divmod(row, M)
        expected = pillow_crop(
            os.fsdecode(everything.paths[image]),
            everything.box_Im4[image, crop],
            bool(everything.flip_Im[image, crop]),
            VIEWS[view].size,
            kind,
        ).astype(int)
        difference = np.abs(ours[row] - expected)
        worst = max(worst, int(difference.max()))
        worst_inside = max(worst_inside, int(difference[1:-1, 1:-1].max()))
        total += float(difference.mean())
    bound = {("cpu", "bilinear"): 2, ("cpu", "bicubic"): 12}.get((backend, kind), 32)
    assert worst <= bound
    if (backend, kind) == ("dali", "bilinear"):
        assert worst_inside <= 2
    assert total / len(ours) < (0.05 if backend == "cpu" else 0.3)


def test_dali_is_within_one_level_of_the_float_kernel_inside(made, everything):
    backend, whole = made
    if backend != "dali":
        pytest.skip("of the dali backend")
    count = len(everything.paths)
    ours = whole[0].unflatten(0, (count, M)).float()
    for image in range(count):
        decoded = decoded_by_pillow(everything.paths[image]).float()
        top, left, height, width = everything.box_Im4[image, 0].tolist()
        exact = functional.resized_crop(decoded, top, left, height, width, [32, 32]).round()
        exact = exact.flip(-1) if everything.flip_Im[image, 0] else exact
        inside = (slice(None), slice(1, -1), slice(1, -1))
        assert (ours[image, 0][inside] - exact[inside]).abs().max() <= 1


@pytest.mark.parametrize("view", range(2))
def test_cpu_equals_torchvisions_resized_crop(made, everything, view):
    backend, whole = made
    if backend != "cpu":
        pytest.skip("of the cpu backend")
    pytest.importorskip("torchvision", minversion="0.24")  # 0.23 rounds floats on AVX-512
    mode = InterpolationMode(VIEWS[view].interpolation)
    for image in range(len(everything.paths)):
        decoded = decoded_by_pillow(everything.paths[image])
        for crop in range(M):
            box = everything.box_Im4[image, crop].tolist()
            expected = functional.resized_crop(decoded, *box, list(VIEWS[view].size), mode)
            if everything.flip_Im[image, crop]:
                expected = functional.horizontal_flip(expected)
            assert torch.equal(whole[view][image * M + crop], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_axes_are_top_left_height_width(backend, tmp_path):
    """One bright rectangle in a wide black image, found only by the right reading of a box."""
    picture = np.zeros((60, 200, 3), dtype=np.uint8)
    picture[10:20, 120:160] = (250, 120, 30)
    picture[10:20, 120:140] = (30, 120, 250)
    Image.fromarray(picture).save(tmp_path / "x.png")
    request = Request(
        paths=[os.fsencode(tmp_path / "x.png")],
        size_I2=np.array([[60, 200]]),
        box_Im4=np.array([[[10, 120, 10, 40]] * 2], dtype=np.uint16),
        flip_Im=np.array([[False, True]]),
    )
    with open_replay(backend, [View((10, 40))]) as replayer:
        (pixels,) = replayer.run([request])
    straight, mirrored = pixels.views[0]
    assert straight[:, 5, 5].tolist() == [30, 120, 250]
    assert straight[:, 5, 35].tolist() == [250, 120, 30]
    assert torch.equal(mirrored, straight.flip(-1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_controls_that_must_fail(backend, everything):
    """The identity tests can fail: a crop off by one, a dropped flip, two images exchanged."""
    rows = range(6)
    right = some(everything, rows)
    shifted = some(everything, rows, [1, 2, 3, 4, 0])
    unflipped = Request(right.paths, right.size_I2, right.box_Im4, np.zeros_like(right.flip_Im))
    exchanged = some(everything, [1, 0, 2, 3, 4, 5])
    with open_replay(backend, VIEWS) as replayer:
        first, *others = (
            p.views[0].clone() for p in replayer.run([right, shifted, unflipped, exchanged])
        )
    assert right.flip_Im.any()
    for other in others:
        assert not torch.equal(first, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_broken_files_fail_alone(backend, everything, tmp_path, capfd):
    good = some(everything, range(5))
    encoded = Path(os.fsdecode(good.paths[1])).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(encoded[: len(encoded) // 2])
    (tmp_path / "empty.jpg").touch()
    broken = some(everything, range(5))
    broken.paths[1] = os.fsencode(tmp_path / "cut.jpg")
    broken.paths[2] = os.fsencode(tmp_path / "empty.jpg")
    broken.paths[3] = os.fsencode(tmp_path / "missing.jpg")
    resized = some(everything, range(5))
    resized.paths[4] = good.paths[0]
    with open_replay(backend, VIEWS) as replayer:
        before, during, size, after = (
            (p, [v.clone() for v in p.views]) for p in replayer.run([good, broken, resized, good])
        )
    assert [f.image for f in during[0].failures] == [1, 2, 3]
    assert {f.code for f in during[0].failures} == {"unreadable"}
    assert [(f.image, f.code) for f in size[0].failures] == [(4, "size-differs")]
    assert "recorded" in size[0].failures[0].detail
    for view in range(2):
        rows = before[1][view].unflatten(0, (5, M))
        kept = during[1][view].unflatten(0, (5, M))
        assert torch.equal(kept[[0, 4]], rows[[0, 4]])
        assert not kept[[1, 2, 3]].any()
        assert torch.equal(after[1][view], before[1][view])
    capfd.readouterr()  # the decoder prints on stderr by itself


def failing_reads(monkeypatch, name: str, times: int) -> None:
    """The first reads of a file end in an error of the disk."""
    left, plain = [times], cpu._load

    def load(path: bytes) -> np.ndarray:
        if path.endswith(name.encode()) and left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, "Input/output error", path)
        return plain(path)

    monkeypatch.setattr(cpu, "_load", load)
    monkeypatch.setattr("fkdpipe.common.disk.RETRY_SECONDS", 0.0)


@pytest.mark.parametrize(("times", "codes"), [(1, []), (2, ["not-the-file"])])
def test_an_error_of_the_disk_is_tried_again_and_never_taken_for_a_broken_file(
    everything, monkeypatch, times, codes
):
    few = some(everything, range(4))
    failing_reads(monkeypatch, os.path.basename(os.fsdecode(few.paths[2])), times)
    with open_replay("cpu", VIEWS) as replayer:
        (pixels,) = replayer.run([few])
    assert [f.code for f in pixels.failures] == codes
    if codes:
        with pytest.raises(ReplayError, match="Input/output error"):
            replay.refuse_passing(pixels)


def test_what_dali_alone_cannot_make_is_no_broken_file(everything, tmp_path, monkeypatch):
    from fkdpipe.pixels.replay import dali

    few = some(everything, range(3))
    few.paths[1] = os.fsencode(tmp_path / "gone.jpg")

    plain = dali.DaliReplay._step

    def broken(self, graph):
        plain(self, graph)
        raise RuntimeError("Error in operator x")

    monkeypatch.setattr(dali.DaliReplay, "_step", broken)
    with open_replay("dali", VIEWS) as replayer:
        (pixels,) = replayer.run([few])
    codes = [f.code for f in pixels.failures]
    assert codes == ["not-the-file", "unreadable", "not-the-file"]


def test_dalis_lack_of_gpu_memory_is_torchs_error(everything, monkeypatch):
    """So that phase 1 halves its batch."""
    from fkdpipe.pixels.replay import dali

    class Graph:
        def run(self, *stream):
            raise RuntimeError(
                "CUDA runtime API error cudaErrorMemoryAllocation (2):\nout of memory"
            )

    monkeypatch.setattr(dali.DaliReplay, "_build", lambda self, *arguments: Graph())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    replayer = dali.DaliReplay(VIEWS, threads=1, prefetch=1, device=torch.device("cuda"))
    with pytest.raises(torch.cuda.OutOfMemoryError, match="DALI"):
        list(replayer.run([some(everything, range(3))]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_box_outside_its_image_is_refused(backend, everything):
    bad = some(everything, range(2))
    bad.box_Im4[1, 0] = (0, 0, 5000, 10)
    with open_replay(backend, VIEWS) as replayer, pytest.raises(ReplayError, match="not inside"):
        list(replayer.run([bad]))


def test_cpu_buffers_are_used_again_only_when_nobody_holds_them(everything):
    small = some(everything, range(3))
    with open_replay("cpu", VIEWS[:1], prefetch=1) as replayer:
        kept = [p.views[0][1:2] for p in replayer.run([small] * 12)]
        assert len({view.untyped_storage().data_ptr() for view in kept}) == 12
        assert all(torch.equal(view, kept[0]) for view in kept)
        del kept
        gc.collect()
        seen = {p.views[0].untyped_storage().data_ptr() for p in replayer.run([small] * 12)}
        assert len(seen) <= 4


def test_pool_threads_leave_torchs_thread_count_alone(everything):
    before = torch.get_num_threads()
    with open_replay("cpu", VIEWS[:1], threads=3) as replayer:
        list(replayer.run([some(everything, range(3))]))
        inside = [replayer._pool.submit(torch.get_num_threads).result() for _ in range(8)]
    assert torch.get_num_threads() == before
    assert set(inside) == {1}


def test_stopping_early_stops_the_work(everything):
    with open_replay("cpu", VIEWS[:1]) as replayer:
        stream = replayer.run(some(everything, [k]) for k in range(20))
        next(stream)
        stream.close()
        again = list(replayer.run([some(everything, range(3))]))
    assert len(again) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_requests_no_pixels(backend):
    with open_replay(backend, VIEWS) as replayer:
        assert list(replayer.run([])) == []


def test_normalise_is_bit_equal_to_torchvision(made):
    pixels = made[1][0]
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    ours = replay.normalise(pixels, mean, std)
    scaled = pixels.contiguous().float().div(255)
    assert torch.equal(ours, functional.normalize(scaled, list(mean), list(std)))
    assert ours.is_contiguous(memory_format=torch.channels_last)


def test_self_check_passes_here_and_can_fail(everything, monkeypatch):
    sample = some(everything, range(6))
    assert replay.self_check(sample, torch.device("cpu")) is None

    from fkdpipe.pixels.replay import dali

    plain = dali.DaliReplay._deliver

    def unsteady(self, request, outputs):
        pixels = plain(self, request, outputs)
        if len(request.paths) > 1:
            pixels.views[0][0, 0, 0, 0] ^= 1
        return pixels

    monkeypatch.setattr(dali.DaliReplay, "_deliver", unsteady)
    assert "depend on its batch" in (replay.self_check(sample, torch.device("cpu")) or "")


def test_the_backend_is_chosen_by_device(everything):
    sample = some(everything, range(2))
    cpu = torch.device("cpu")
    assert replay.choose_backend("auto", cpu, sample) == "cpu"
    assert replay.choose_backend("dali", cpu, sample) == "dali"
    with pytest.raises(UsageError):
        replay.open_replay("pillow", VIEWS)  # type: ignore[arg-type]


def test_a_request_is_made_of_recorded_crops(scanned, everything):
    drawn = crops.sample(
        CropDistribution(jitter=crops.Jitter(hue=0.1)),
        seed=11,
        image_id_N=crops.image_ids(scanned.keys),
        size_N2=scanned.size_N2,
        crops_M=np.arange(M),
    )
    rows = np.array([5, 2])
    keys = [scanned.keys[row] for row in rows]
    made = Request.of(scanned.root, keys, scanned.size_N2[rows], drawn[rows], tag="t")
    assert made.paths == [everything.paths[row] for row in rows]
    assert np.array_equal(made.box_Im4, everything.box_Im4[rows])
    assert np.array_equal(made.flip_Im, everything.flip_Im[rows])
    assert made.tag == "t"
    one_each = drawn[rows[:, None], np.array([1, 0])[:, None]]
    assert np.array_equal(one_each.box_NM4, everything.box_Im4[rows, [1, 0]][:, None])
    assert one_each.jitter_NM4.shape == (2, 1, 4)
    with pytest.raises(ImagesError, match="not the path of an image"):
        Request.of(scanned.root, ["../x.jpg"], scanned.size_N2[:1], drawn[:1])


def test_a_view_is_what_a_preprocessing_asks_for():
    asked = Preprocessing((32, 40), "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert View.of(asked) == View((32, 40), "bicubic")
