"""Draw a contact sheet: images with the boxes of their crops, and labels as bars."""

from __future__ import annotations

import functools
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fkdpipe.inspect.views import CropView, ImageView, LabelView, Views

INK, SOFT, FAINT, PAPER = "#1b1f24", "#5b6570", "#e4e8ec", "#ffffff"
TRUTH, OTHER, WRONG = "#8fd3a1", "#b9c9e4", "#c62f3b"
RIGHT = "#1a7f37"
# Box colours: distinguishable with colour blindness, and not the green or red of agreement.
BOXES = ("#ff8c00", "#0072ff", "#d81bce", "#00a6a6", "#ffd000", "#7a3ff0", "#8a5a2b", "#111111")

GAP, LINE, BAR = 12, 17, 18
WIDTH = 1280  # of the sheet, unless one image needs more


def draw(views: Views, *, title: str) -> Image.Image:
    """Draw the sheet, `WIDTH` pixels wide unless one image needs more."""
    cards = [card(view) for view in views.images]
    columns = max(1, (WIDTH - GAP) // (max(c.width for c in cards) + GAP))
    rows = [cards[first : first + columns] for first in range(0, len(cards), columns)]
    width = GAP + max(sum(c.width + GAP for c in row) for row in rows)
    notes = [f"left out: {why}" for why in views.left_out]
    head = 2 * LINE + GAP
    height = head + sum(max(c.height for c in row) + GAP for row in rows) + LINE * len(notes) + GAP
    width = max(width, 560)
    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, 8), elide(title, width - 2 * GAP, 15, bold=True), INK, font=font(15, bold=True))
    _legend(pen, GAP, 8 + LINE + 4)
    top = head + 4
    for row in rows:
        left = GAP
        for each in row:
            sheet.paste(each, (left, top))
            left += each.width + GAP
        top += max(c.height for c in row) + GAP
    for note in notes:
        pen.text((GAP, top), elide(note, width - 2 * GAP, 12), SOFT, font=font(12))
        top += LINE
    return sheet


def _legend(pen: ImageDraw.ImageDraw, left: float, top: int) -> None:
    for colour, words in ((TRUTH, "the image's class"), (OTHER, "other classes")):
        pen.rectangle((left, top + 2, left + 12, top + 13), fill=colour)
        pen.text((left + 18, top), words, SOFT, font=font(12))
        left += 18 + font(12).getlength(words) + 16
    for sign, colour, words in (
        ("✓", RIGHT, "top class is the image's class"),
        ("✗", WRONG, "it is not"),
        ("⇄", SOFT, "mirrored"),
        ("◐", SOFT, "colour jitter"),
    ):
        pen.text((left, top), sign, colour, font=font(13, bold=True))
        pen.text((left + 15, top), words, SOFT, font=font(12))
        left += 15 + font(12).getlength(words) + 16


def card(view: ImageView) -> Image.Image:
    """Draw one image: the whole with its boxes, then each crop with its bars."""
    whole = with_boxes(view)
    side = view.crops[0].pixels.shape[0]
    labels = max(len(crop.labels) for crop in view.crops)
    bars = max(len(label.bars) for crop in view.crops for label in crop.labels)
    crop_height = side + 6 + labels * (LINE + (bars + 1) * BAR + 6)
    height = LINE + 6 + max(whole.height + 2 * LINE, LINE + crop_height)
    width = whole.width + GAP + len(view.crops) * (side + GAP)
    picture = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(picture)
    pen.line((0, 0, width, 0), fill=FAINT, width=1)
    pen.text((0, 4), elide(view.key, width, 12), SOFT, font=font(12))
    top = LINE + 6
    picture.paste(whole, (0, top + LINE))
    name = view.class_name or "no class"
    pen.text((0, top - 1), elide(name, whole.width, 13, bold=True), INK, font=font(13, bold=True))
    facts = f"{view.size[1]} x {view.size[0]} pixels"
    pen.text((0, top + LINE + whole.height + 3), facts, SOFT, font=font(11))
    left = whole.width + GAP
    for index, crop in enumerate(view.crops):
        _crop(picture, pen, crop, left, top, BOXES[index % len(BOXES)])
        left += side + GAP
    return picture


def _crop(
    picture: Image.Image, pen: ImageDraw.ImageDraw, crop: CropView, left: int, top: int, colour: str
) -> None:
    side = crop.pixels.shape[0]
    pen.text((left, top), elide(facts_of(crop), side, 12), SOFT, font=font(12))
    picture.paste(Image.fromarray(crop.pixels), (left, top + LINE))
    pen.rectangle(
        (left, top + LINE, left + side - 1, top + LINE + side - 1), outline=colour, width=3
    )
    top += LINE + side + 6
    for label in crop.labels:
        top = _label(pen, label, left, top, side, named=len(crop.labels) > 1)


def facts_of(crop: CropView) -> str:
    """Caption of a crop: index, size in the image, and signs for flip and colour jitter."""
    height, width = crop.box[2:]
    signs = ("⇄" if crop.flip else "") + ("◐" if crop.jitter else "")
    return f"crop {crop.index}  {width} x {height}  {signs}".rstrip()


def _label(
    pen: ImageDraw.ImageDraw, label: LabelView, left: int, top: int, width: int, *, named: bool
) -> int:
    """Draw a label's bars; return the y position below them."""
    sign, colour = {True: ("✓", RIGHT), False: ("✗", WRONG), None: ("", SOFT)}[label.agrees]
    pen.text((left, top - 1), sign, colour, font=font(13, bold=True))
    words = f"entropy {label.entropy:.2f}"
    words = f"{label.source}: {words}" if named else words
    indent = 16 if sign else 0
    pen.text((left + indent, top), elide(words, width - indent, 11), SOFT, font=font(11))
    top += LINE
    rows = [(bar.name, bar.probability, TRUTH if bar.truth else OTHER) for bar in label.bars]
    for name, probability, fill in [*rows, ("all others", label.rest, FAINT)]:
        length = max(round((width - 1) * probability), 4 if fill == TRUTH else 0)  # keep it visible
        pen.rectangle((left, top, left + width - 1, top + BAR - 3), fill="#f6f7f9")
        if length:
            pen.rectangle((left, top, left + length, top + BAR - 3), fill=fill)
        share = percent(probability)
        room = font(11).getlength(share)
        pen.text((left + width - 3 - room, top + 1), share, INK, font=font(11))
        pen.text((left + 4, top + 1), elide(name, width - room - 14, 11), INK, font=font(11))
        top += BAR
    return top + 6


def with_boxes(view: ImageView) -> Image.Image:
    """The whole image with the boxes of its crops, in the colours of their frames."""
    picture = Image.fromarray(view.picture)
    pen = ImageDraw.Draw(picture)
    down, across = picture.height / view.size[0], picture.width / view.size[1]
    for index, crop in enumerate(view.crops):
        top, left, height, width = crop.box
        corners = (
            round(left * across),
            round(top * down),
            max(round((left + width) * across) - 1, round(left * across) + 1),
            max(round((top + height) * down) - 1, round(top * down) + 1),
        )
        pen.rectangle(corners, outline=BOXES[index % len(BOXES)], width=3)
    return picture


def percent(share: float) -> str:
    """Format a fraction: 63 %, 4.2 %, <0.1 %."""
    if 0 < share < 0.001:
        return "<0.1 %"
    return f"{100 * share:.0f} %" if share >= 0.0995 or share == 0 else f"{100 * share:.1f} %"


def to_png(picture: Image.Image | np.ndarray) -> bytes:
    """The bytes of a PNG file."""
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def elide(text: str, width: float, size: int, *, bold: bool = False) -> str:
    """The text on one line, with its middle elided if it is wider than `width` pixels."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    face = font(size, bold=bold)
    if face.getlength(text) <= width:
        return text
    for kept in range(len(text) - 1, 1, -1):
        short = f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}"
        if face.getlength(short) <= width:
            return short
    return "…"


@functools.cache
def font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans from matplotlib, so that it is the same on every machine."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), size)
