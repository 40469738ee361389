"""The chosen crops as pixels and bars: what a contact sheet or a page draws."""

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

BARS = 4  # most probable classes that are named; the image's own is added when it is not among them


@dataclass(frozen=True)
class Bar:
    """One class of a label; `truth`: it is the image's own."""

    name: str
    probability: float
    truth: bool


@dataclass(frozen=True)
class LabelView:
    """A source's label of one crop.

    Attributes:
        bars: the most probable classes, and the image's own.
        rest: probability of the classes not named.
        agrees: is the first choice the image's class? None where that is not known.
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
        jitter: are its colours changed, as recorded?
        pixels: uint8 (side, side, 3), replayed (flipped, colours changed), as a student sees it.
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
        class_name: None where the image has none.
        size: (height, width) of the image.
        picture: uint8 (height, width, 3), the whole image no larger than asked for.
        score: what the crops were ranked by, None when they were not.
    """

    key: str
    class_name: str | None
    size: tuple[int, int]
    picture: np.ndarray
    crops: tuple[CropView, ...]
    score: float | None = None


@dataclass(frozen=True)
class Views:
    """What was asked for: the images that could be shown, and why others could not."""

    images: tuple[ImageView, ...]
    left_out: tuple[str, ...]


def look(
    opened: Opened, data: Path, chosen: Sequence[Chosen], *, side: int = 160, picture: int = 220
) -> Views:
    """Replay the chosen crops and read their labels.

    Args:
        data: the image folder the store was made from.
        side: height and width of a crop's pixels. picture: longest side of the whole image.

    Raises:
        ImagesError: no such folder. ReplayError: none of the images can be shown.
    """
    root = images.split_root(data, "train")
    shown: list[ImageView] = []
    left_out: list[str] = []
    with open_replay("cpu", [View((side, side))]) as replayer:
        wanted = [request(opened, root, np.array([c.row]), np.array(c.crops)) for c in chosen]
        for each, asked, pixels in zip(chosen, wanted, replayer.run(wanted), strict=True):
            key = str(opened.store.images.keys[each.row])
            if pixels.failures:
                left_out.append(f"{key}: {pixels.failures[0].detail}")
                continue
            try:
                small = whole(asked.paths[0], asked.size_I2[0], picture)
            except ReplayError as error:  # another decoder's word on the same file
                left_out.append(f"{key}: {error}")
                continue
            jitter_m4 = factors(opened, np.array([each.row]), np.array(each.crops))
            views_m3HW = colour.jitter(pixels.views[0], jitter_m4).numpy()
            shown.append(
                ImageView(
                    key=key,
                    class_name=_class_name(opened, each.row),
                    size=(int(asked.size_I2[0, 0]), int(asked.size_I2[0, 1])),
                    picture=small,
                    crops=tuple(
                        CropView(
                            index=index,
                            box=tuple(asked.box_Im4[0, place].tolist()),
                            flip=bool(asked.flip_Im[0, place]),
                            jitter=jitter_m4 is not None,
                            pixels=views_m3HW[place].transpose(1, 2, 0).copy(),
                            labels=tuple(
                                label_view(opened, source, each.row, index)
                                for source in opened.labels
                            ),
                        )
                        for place, index in enumerate(each.crops)
                    ),
                    score=each.score,
                )
            )
    if chosen and not shown:
        hint = _other_images(opened, root)
        raise ReplayError(f"{root}: no image can be shown; {left_out[0]}.{hint}", code="no-images")
    return Views(tuple(shown), tuple(left_out))


def _other_images(opened: Opened, root: Path) -> str:
    """What to say where none of a sample of the store's images is in a folder."""
    keys = [str(key) for key in opened.store.images.keys[:20]]
    if any(os.path.exists(images.path_of(root, key)) for key in keys):
        return ""
    found = _some(images.class_folders(root)) or "no folders"
    return (
        f" These seem to be other images than the store's: found {found}; expected images like "
        f"{_some(keys)}. Name the folder that the store was made of."
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _class_name(opened: Opened, row: int) -> str | None:
    number = int(opened.store.images.class_N[row])
    return opened.store.images.class_names[number] if number >= 0 else None


def whole(path: bytes, size_2: np.ndarray, longest: int) -> np.ndarray:
    """uint8 (height, width, 3): an image made smaller, EXIF orientation not applied.

    Raises:
        ReplayError: it cannot be decoded, or to another size than recorded.
    """
    recorded = (int(size_2[0]), int(size_2[1]))
    try:
        with Image.open(os.fsdecode(path)) as image:
            found = image.size[::-1]
            plain = image.convert("RGB")
    except DECODE_ERRORS as error:
        raise ReplayError(f"{os.fsdecode(path)} cannot be decoded: {error}.") from error
    if found != recorded:
        raise ReplayError(f"{os.fsdecode(path)} {size_failure(0, found, recorded).detail}.")
    scale = longest / max(plain.size)
    small = (max(round(plain.width * scale), 1), max(round(plain.height * scale), 1))
    return np.asarray(plain.resize(small, Image.Resampling.BICUBIC))


def label_view(opened: Opened, source: Labels, row: int, index: int) -> LabelView:
    """The bars of one crop's label."""
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
