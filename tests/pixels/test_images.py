"""Scanning folders: what is taken, what is rejected and recorded, what is refused."""

from __future__ import annotations

import errno
import io
import os
import struct
import zlib

import numpy as np
import pytest
from conftest import CLASSES, write_odd_files
from PIL import Image

from fkdpipe.common.errors import ImagesError
from fkdpipe.pixels import images


def save(path, cut, seed=0, size=(40, 50), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    cut(seed, *size).save(path, **options)


def reasons(folder: images.ImageFolder) -> dict[str, str]:
    return {r.key: r.reason for r in folder.rejected}


def png_16_bit() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 4, 4, 16, 0, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + b"\1\2" * 4 for _ in range(4)))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def test_a_split_folder_is_listed_in_order(folder, scanned):
    assert scanned.class_names == tuple(sorted(CLASSES))
    assert scanned.root == folder / "train"
    assert len(scanned) == 5 * 8 + 11
    assert all(
        scanned.keys[k].startswith(scanned.class_names[c] + "/")
        for k, c in enumerate(scanned.class_N.tolist())
    )
    held_out = images.scan(folder, split="val")
    assert len(held_out) == 10
    assert held_out.class_names == scanned.class_names


def test_sizes_are_height_width_of_the_decoded_image_without_exif(scanned):
    sizes = dict(zip(scanned.keys, scanned.size_N2.tolist(), strict=True))
    assert sizes["cedar/deeper/plain.jpg"] == [70, 110]
    assert sizes["cedar/deeper/rotated.jpg"] == [70, 110]
    for key, size in sizes.items():
        with Image.open(images.path_of(scanned.root, key)) as image:
            assert [image.height, image.width] == size


def test_content_counts_not_the_ending(tmp_path, cut):
    save(tmp_path / "a" / "really.png", cut, format="JPEG")
    save(tmp_path / "a" / "noending", cut, format="PNG")
    (tmp_path / "a" / "notes.jpg").write_text("not an image")
    save(tmp_path / "a" / "old.bmp", cut, format="BMP")
    folder = images.scan(tmp_path)
    assert folder.keys == ("a/noending", "a/really.png")
    assert reasons(folder) == {"a/notes.jpg": "not-an-image", "a/old.bmp": "not-an-image"}


def test_what_cannot_be_used_is_rejected_and_recorded(tmp_path, cut):
    save(tmp_path / "a" / "good.jpg", cut)
    (tmp_path / "a" / "sixteen.png").write_bytes(png_16_bit())
    (tmp_path / "a" / "empty.jpg").touch()
    (tmp_path / "a" / "stump.jpg").write_bytes((tmp_path / "a" / "good.jpg").read_bytes()[:20])
    frames = [cut(k, 20, 20) for k in range(3)]
    frames[0].save(tmp_path / "a" / "moving.webp", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "a" / "moving.png", save_all=True, append_images=frames[1:])
    (tmp_path / "a" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    save(tmp_path / "beside.jpg", cut)
    (tmp_path / "a" / "up").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "self").symlink_to("self")
    (tmp_path / "itself").symlink_to("itself")
    (tmp_path / ".cache").mkdir()
    folder = images.scan(tmp_path)
    assert folder.class_names == ("a",)
    assert folder.keys == ("a/good.jpg",)
    assert reasons(folder) == {
        ".cache": "hidden",
        "a/empty.jpg": "not-an-image",
        "a/gone.jpg": "unreadable",
        "a/moving.png": "animation",
        "a/moving.webp": "animation",
        "a/sixteen.png": "16-bit",
        "a/stump.jpg": "broken-header",
        "a/self": "link-loop",
        "a/up": "link-loop",
        "beside.jpg": "outside-class",
        "itself": "link-loop",
    }


@pytest.mark.skipif(os.getuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_rejected(tmp_path, cut):
    save(tmp_path / "a" / "good.jpg", cut)
    save(tmp_path / "a" / "secret.jpg", cut)
    (tmp_path / "a" / "secret.jpg").chmod(0)
    assert reasons(images.scan(tmp_path)) == {"a/secret.jpg": "unreadable"}


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("name", ["a", "b/1.jpg"])
def test_an_error_of_the_disk_leaves_no_file_or_folder_out(tmp_path, cut, monkeypatch, name, times):
    for key in ("a/0.jpg", "b/0.jpg", "b/1.jpg"):
        save(tmp_path / key, cut)
    left = [times]

    def fail(path: str) -> None:
        if str(path) == str(tmp_path / name) and left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def failing_open(path: str, mode: str):
        fail(path)
        return open(path, mode)

    def failing_list(path: str, plain=os.scandir):
        fail(path)
        return plain(path)

    monkeypatch.setattr("fkdpipe.common.disk.RETRY_SECONDS", 0.0)
    monkeypatch.setattr(images, "open", failing_open, raising=False)
    monkeypatch.setattr(os, "scandir", failing_list)
    if times == 1:
        assert images.scan(tmp_path).keys == ("a/0.jpg", "b/0.jpg", "b/1.jpg")
    else:
        with pytest.raises(
            ImagesError, match=f"{name}: Input/output error. This error may be temporary"
        ):
            images.scan(tmp_path)


NAMES = ["with space.jpg", "ünïcode.jpg", "a.b.c.jpg", "100%.jpg", "%41.jpg", "line\nbreak.jpg"]


def test_names_survive_the_round_trip_through_keys(tmp_path, cut):
    (tmp_path / "a").mkdir()
    raw = os.path.join(os.fsencode(tmp_path), b"a", b"latin\xe9.jpg")
    encoded = io.BytesIO()
    cut(0, 30, 40).save(encoded, "JPEG")
    for name in NAMES:
        (tmp_path / "a" / name).write_bytes(encoded.getvalue())
    with open(raw, "wb") as file:
        file.write(encoded.getvalue())
    folder = images.scan(tmp_path)
    assert len(folder) == len(NAMES) + 1
    assert {images.path_of(tmp_path, key) for key in folder.keys} == {
        raw,
        *(os.fsencode(tmp_path / "a" / name) for name in NAMES),
    }
    for key in folder.keys:
        key.encode()  # every key is text that UTF-8 can hold
    assert "a/latin%E9.jpg" in folder.keys
    assert "a/%2541.jpg" in folder.keys


@pytest.mark.parametrize("key", ["../secret.jpg", "a/../../secret.jpg", "/etc/passwd", "a//b", ""])
def test_a_key_never_leaves_the_folder(tmp_path, key):
    with pytest.raises(ImagesError):
        images.path_of(tmp_path, key)


def test_an_empty_class_keeps_its_place(tmp_path, cut):
    save(tmp_path / "a" / "x.jpg", cut)
    (tmp_path / "b").mkdir()
    save(tmp_path / "c" / "x.jpg", cut)
    folder = images.scan(tmp_path)
    assert folder.class_names == ("a", "b", "c")
    assert folder.class_N.tolist() == [0, 2]
    assert folder.empty_classes == ("b",)


def test_a_flat_folder_needs_no_classes_only_when_asked(tmp_path, cut):
    save(tmp_path / "x.jpg", cut)
    with pytest.raises(ImagesError, match="no class folders") as raised:
        images.scan(tmp_path)
    assert raised.value.code == "no-classes"
    flat = images.scan(tmp_path, need_classes=False)
    assert flat.keys == ("x.jpg",)
    assert flat.class_N.tolist() == [-1]


def test_refusals_say_what_was_found(tmp_path, cut):
    with pytest.raises(ImagesError, match="no such folder"):
        images.scan(tmp_path / "missing")
    save(tmp_path / "one" / "x.jpg", cut)
    with pytest.raises(ImagesError, match="is a file"):
        images.scan(tmp_path / "one" / "x.jpg")
    with pytest.raises(ImagesError, match="no val/ folder"):
        images.scan(tmp_path, split="val")
    (tmp_path / "empty" / "a").mkdir(parents=True)
    with pytest.raises(ImagesError, match="no images found"):
        images.scan(tmp_path / "empty")
    (tmp_path / "empty" / "a" / "x.jpg").write_text("text")
    with pytest.raises(ImagesError, match="no usable image among 1 files"):
        images.scan(tmp_path / "empty")


def test_train_alone_is_a_split_but_a_class_named_train_is_not(tmp_path, cut):
    save(tmp_path / "train" / "a" / "x.jpg", cut)
    assert images.split_root(tmp_path, "train") == tmp_path / "train"
    save(tmp_path / "boat" / "x.jpg", cut)
    assert images.split_root(tmp_path, "train") == tmp_path


@pytest.mark.parametrize("names", [("train", "test"), ("train", "valid"), ("val",), ("train",)])
def test_folders_named_as_splits_are_never_classes(tmp_path, cut, names):
    for name in names:
        save(tmp_path / name / "a" / "x.jpg", cut)
    for split in ("train", "val"):
        if split in names or (split == "val" and "valid" in names):
            assert images.scan(tmp_path, split=split).class_names == ("a",)
        else:
            with pytest.raises(ImagesError, match=f"{names[0]}/.*, but no {split}/ folder"):
                images.scan(tmp_path, split=split)


@pytest.mark.parametrize(
    ("train", "val"),
    [("Train", "Val"), ("training", "validation"), ("TRAIN", "valid"), ("training_set", "val_set"),
     ("seg_train", "seg_dev"), ("train2017", "val2017"), ("Train Images", "Eval Images")],
)  # fmt: skip
def test_splits_are_known_by_their_usual_names(tmp_path, cut, train, val):
    save(tmp_path / train / "a" / "x.jpg", cut)
    save(tmp_path / val / "a" / "y.jpg", cut)
    assert images.scan(tmp_path).root == tmp_path / train
    assert images.scan(tmp_path, split="val").root == tmp_path / val


@pytest.mark.parametrize("test", ["Test", "testing", "test_set"])
def test_a_training_and_a_test_folder_are_splits_whatever_lies_beside_them(tmp_path, cut, test):
    for name in ("Training", test, "annotations"):
        save(tmp_path / name / "a" / "x.jpg", cut)
    assert images.scan(tmp_path).class_names == ("a",)
    with pytest.raises(ImagesError, match=f"has {min(test, 'Training')}/ and .*, but no val/"):
        images.scan(tmp_path, split="val")


def test_of_two_folders_for_a_split_the_exact_name_is_taken(tmp_path, cut):
    for name in ("train", "Val", "validation"):
        save(tmp_path / name / "a" / "x.jpg", cut)
    with pytest.raises(ImagesError, match="Val/ and validation/, which may both be the val"):
        images.split_root(tmp_path, "val")
    save(tmp_path / "val" / "a" / "x.jpg", cut)
    assert images.split_root(tmp_path, "val") == tmp_path / "val"


@pytest.mark.parametrize("doubled", ["set/set/train", "set/train/train", "set/inner/train"])
def test_a_doubled_folder_is_entered(tmp_path, cut, doubled):
    save(tmp_path / doubled / "a" / "x.jpg", cut)
    save(tmp_path / doubled.replace("train", "val") / "a" / "x.jpg", cut)
    save(tmp_path / "set" / "__MACOSX" / "a" / "x.jpg", cut)
    scanned = images.scan(tmp_path / "set")
    assert (scanned.root, scanned.class_names) == (tmp_path / doubled, ("a",))
    assert images.scan(tmp_path / "set", split="val").keys == ("a/x.jpg",)


def test_doubled_folders_without_splits_and_single_classes(tmp_path, cut):
    save(tmp_path / "set" / "Set" / "a" / "x.jpg", cut)
    assert images.scan(tmp_path / "set").class_names == ("a",)
    save(tmp_path / "cat" / "cat" / "x.jpg", cut)
    assert images.scan(tmp_path / "cat").class_names == ("cat",)
    save(tmp_path / "cat" / "cat" / "more" / "y.jpg", cut)
    assert images.scan(tmp_path / "cat").keys == ("cat/more/y.jpg", "cat/x.jpg")


def test_class_folders_that_hold_only_folders_are_refused(tmp_path, cut):
    for name in ("learn/a", "learn/b", "exam/a", "exam/b"):
        save(tmp_path / name / "x.jpg", cut)
    words = r"exam/, learn/ are taken for classes, .* directly in exam/, only folders \(a/, b/\)"
    with pytest.raises(ImagesError, match=words) as caught:
        images.scan(tmp_path)
    assert f"give {tmp_path / 'exam'}" in str(caught.value)
    save(tmp_path / "exam" / "y.jpg", cut)
    with pytest.raises(ImagesError, match="learn/ is taken for a class"):
        images.scan(tmp_path)


def test_another_list_of_classes_says_that_an_empty_folder_will_do(tmp_path, cut):
    for name in ("train/a", "train/b", "val/a"):
        save(tmp_path / name / "x.jpg", cut)
    expected = images.scan(tmp_path).class_names
    with pytest.raises(ImagesError, match=r"missing 1 \(b\)\. An empty folder will do"):
        images.check_same_classes(
            expected, images.scan(tmp_path, split="val").class_names, where="v"
        )
    (tmp_path / "val" / "b").mkdir()
    images.check_same_classes(expected, images.scan(tmp_path, split="val").class_names, where="v")


def test_the_fingerprint_is_of_names_and_sizes_alone(tmp_path, cut):
    for place in ("here", "there"):
        save(tmp_path / place / "a" / "x.jpg", cut)
        save(tmp_path / place / "b" / "y.jpg", cut, seed=2)
    here, there = images.scan(tmp_path / "here"), images.scan(tmp_path / "there")
    assert here.fingerprint == there.fingerprint
    with open(tmp_path / "there" / "a" / "x.jpg", "ab") as file:
        file.write(b"\0")
    assert images.scan(tmp_path / "there").fingerprint != here.fingerprint


def test_class_lists_that_differ_are_refused_with_names():
    images.check_same_classes(("a", "b"), ("a", "b"), where="here")
    with pytest.raises(ImagesError, match=r"missing 1 \(b\); unknown 1 \(c\)"):
        images.check_same_classes(("a", "b"), ("a", "c"), where="here")
    with pytest.raises(ImagesError, match="order differs"):
        images.check_same_classes(("a", "b"), ("b", "a"), where="here")


def test_every_kind_of_file_is_taken(tmp_path, cut):
    write_odd_files(tmp_path / "a", cut)
    folder = images.scan(tmp_path)
    assert len(folder) == 11
    assert not folder.rejected
    assert folder.size_N2.dtype == np.uint16


def test_a_git_lfs_pointer_is_called_one(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "x.png")
    (tmp_path / "a" / "y.jpg").write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n")
    (rejected,) = images.scan(tmp_path).rejected
    assert (rejected.key, rejected.reason) == ("a/y.jpg", "not-an-image")
    assert "git lfs pull" in rejected.detail
