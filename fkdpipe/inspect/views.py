"""Selected crops as pixels and bars, for contact sheets and pages."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fkdpipe.common.errors import ReplayError
from fkdpipe.inspect.choose import Chosen
from fkdpipe.inspect.measures import entropy
from fkdpipe.inspect.models import factors, request
from fkdpipe.inspect.sources import Labels, Opened
from fkdpipe.pixels import colour, images
from fkdpipe.pixels.replay import DECODE_ERRORS, View, open_replay, size_failure

BARS = 4  # named classes: the most probable ones, always with the image's class


@dataclass(frozen=True)
class Bar:
    """One class of a label. truth: whether it is the image's class."""

    name: str
    probability: float
    truth: bool


@dataclass(frozen=True)
class LabelView:
    """One source's label of a crop.

    Attributes:
        bars: the most probable classes, and the image's class.
        rest: probability of all other classes.
        agrees: whether the top class is the image's class; None if unknown.
        entropy: in nats.
    """

    source: str
    bars: tuple[Bar, ...]
    rest: float
    agrees: bool | None
    entropy: float


@dataclass(frozen=True)
class CropView:
    """One recorded crop.

    Attributes:
        box: (top, left, height, width) in pixels of the image.
        jitter: whether it has recorded colour jitter.
        pixels: uint8 (side, side, 3), replayed with flip and jitter, as a student sees it.
    """

    index: int
    box: tuple[int, int, int, int]
    flip: bool
    jitter: bool
    pixels: np.ndarray
    labels: tuple[LabelView, ...]


@dataclass(frozen=True)
class ImageView:
    """An image and some of its crops.

    Attributes:
        class_name: None if the image has no class.
        size: (height, width) of the image.
        picture: uint8 (height, width, 3), the whole image, downscaled.
        score: ranking score of the crops; None if they are not ranked.
    """

    key: str
    class_name: str | None
    size: tuple[int, int]
    picture: np.ndarray
    crops: tuple[CropView, ...]
    score: float | None = None


@dataclass(frozen=True)
class Views:
    """The images that can be shown, and the reasons why others cannot."""

    images: tuple[ImageView, ...]
    left_out: tuple[str, ...]


def look(
    opened: Opened, data: Path, chosen: Sequence[Chosen], *, side: int = 160, picture: int = 220
) -> Views:
    """Replay the selected crops and read their labels.

    Args:
        data: the image folder that the store was made from.
        side: height and width of a crop in pixels. picture: longest side of the whole image.

    Raises:
        ImagesError: no such folder. ReplayError: none of the images can be shown.
    """
    root = images.split_root(data, "train")
    shown: list[ImageView] = []
    left_out: list[str] = []
    with open_replay("cpu", [View((side, side))]) as replayer:
        requests = [request(opened, root, np.array([c.row]), np.array(c.crops)) for c in chosen]
        for each, replayed, pixels in zip(chosen, requests, replayer.run(requests), strict=True):
            key = str(opened.store.images.keys[each.row])
            if pixels.failures:
                left_out.append(f"{key}: {pixels.failures[0].detail}")
                continue
            try:
                small = whole(replayed.paths[0], replayed.size_I2[0], picture)
            except ReplayError as error:  # the other decoder fails on this file
                left_out.append(f"{key}: {error}")
                continue
            jitter_m4 = factors(opened, np.array([each.row]), np.array(each.crops))
            views_m3HW = colour.jitter(pixels.views[0], jitter_m4).numpy()
            shown.append(
                ImageView(
                    key=key,
                    class_name=_class_name(opened, each.row),
                    size=(int(replayed.size_I2[0, 0]), int(replayed.size_I2[0, 1])),
                    picture=small,
                    crops=tuple(
                        CropView(
                            index=index,
                            box=tuple(replayed.box_Im4[0, position].tolist()),
                            flip=bool(replayed.flip_Im[0, position]),
                            jitter=jitter_m4 is not None,
                            pixels=views_m3HW[position].transpose(1, 2, 0).copy(),
                            labels=tuple(
                                label_view(opened, source, each.row, index)
                                for source in opened.labels
                            ),
                        )
                        for position, index in enumerate(each.crops)
                    ),
                    score=each.score,
                )
            )
    if chosen and not shown:
        hint = _other_images(opened, root)
        raise ReplayError(f"{root}: no image can be shown; {left_out[0]}.{hint}", code="no-images")
    return Views(tuple(shown), tuple(left_out))


def _other_images(opened: Opened, root: Path) -> str:
    """A hint if none of a sample of the store's images is in the folder."""
    keys = [str(key) for key in opened.store.images.keys[:20]]
    if any(os.path.exists(images.path_of(root, key)) for key in keys):
        return ""
    folders = _some(images.class_folders(root)) or "no folders"
    return (
        f" These do not seem to be the store's images: found {folders}; expected images like "
        f"{_some(keys)}. Name the folder that the store was made from."
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _class_name(opened: Opened, row: int) -> str | None:
    number = int(opened.store.images.class_N[row])
    return opened.store.images.class_names[number] if number >= 0 else None


def whole(path: bytes, size_2: np.ndarray, longest: int) -> np.ndarray:
    """uint8 (height, width, 3): a downscaled image, without applying the EXIF orientation.

    Raises:
        ReplayError: it cannot be decoded, or its size differs from the recorded one.
    """
    recorded = (int(size_2[0]), int(size_2[1]))
    try:
        with Image.open(os.fsdecode(path)) as image:
            size = image.size[::-1]
            plain = image.convert("RGB")
    except DECODE_ERRORS as error:
        raise ReplayError(f"{os.fsdecode(path)} cannot be decoded: {error}.") from error
    if size != recorded:
        raise ReplayError(f"{os.fsdecode(path)} {size_failure(0, size, recorded).detail}.")
    scale = longest / max(plain.size)
    small = (max(round(plain.width * scale), 1), max(round(plain.height * scale), 1))
    return np.asarray(plain.resize(small, Image.Resampling.BICUBIC))


def label_view(opened: Opened, source: Labels, row: int, index: int) -> LabelView:
    """The label of one crop, as bars."""
    prob_C = source.take(np.array([row]), np.array([index]))[0, 0]
    truth = int(opened.truth_N[row])
    order = np.argsort(-prob_C, kind="stable")[:BARS].tolist()
    if truth >= 0 and truth not in order:
        order[-1] = truth
    bars = tuple(Bar(opened.class_names[c], float(prob_C[c]), c == truth) for c in order)
    return LabelView(
        source=source.name,
        bars=bars,
        rest=max(1.0 - sum(bar.probability for bar in bars), 0.0),
        agrees=None if truth < 0 else order[0] == truth,
        entropy=float(entropy(prob_C[None])[0]),
    )
