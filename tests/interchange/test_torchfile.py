"""Label files are data: what torch wrote is read exactly, what would run or explode is refused."""

from __future__ import annotations

import io
import os
import pickle
import struct
import warnings
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

from fkdpipe import interchange
from fkdpipe.common.errors import LabelsError
from fkdpipe.interchange import torchfile
from fkdpipe.interchange.source import ImportSettings
from fkdpipe.interchange.torchfile import BrokenFileError, as_array, loads


def saved(value, **options) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def packed(text: bytes, members=(), compression=zipfile.ZIP_STORED) -> bytes:
    """A torch file around any pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", text)
        archive.writestr("archive/version", "3\n")
        for name, data in members:
            archive.writestr(f"archive/{name}", data)
    return file.getvalue()


def refused(data: bytes) -> BrokenFileError:
    with pytest.raises(BrokenFileError) as caught:
        loads(data)
    return caught.value


NUMBERS = [
    np.arange(12).astype(kind).reshape(3, 4)
    for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "?")
]


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("array", NUMBERS, ids=lambda a: a.dtype.name)
def test_arrays_and_tensors_are_read_as_torch_reads_them(array, protocol):
    for value in (array, torch.from_numpy(array)):
        (found,) = loads(saved([value], pickle_protocol=protocol))
        assert as_array(found).dtype == array.dtype
        np.testing.assert_array_equal(as_array(found), array)


def test_arrays_of_numpy_1_are_read():
    """NumPy 1 names its module `numpy.core`; the bytes are otherwise the same."""
    array = np.linspace(0, 1, 7, dtype=np.float32)
    text = pickle.dumps([array], protocol=2).replace(b"numpy._core", b"numpy.core")
    assert b"numpy.core.multiarray" in text
    np.testing.assert_array_equal(as_array(loads(packed(text))[0]), array)


def test_views_strides_order_and_emptiness_survive():
    base = torch.arange(24.0).reshape(4, 6)
    tensors = [base[1:, ::2], base.T, base[:0], base[2, 3], base.expand(2, 4, 6)]
    for tensor, found in zip(tensors, loads(saved(tensors)), strict=True):
        np.testing.assert_array_equal(as_array(found), tensor.numpy())
    arrays = [np.asfortranarray(base.numpy()), np.array(3.5, dtype=">f4"), np.zeros((0, 3), "f4")]
    for array, found in zip(arrays, loads(saved(arrays)), strict=True):
        np.testing.assert_array_equal(as_array(found), array)


def test_mapped_files_give_the_same_without_reading_everything(tmp_path):
    value = [torch.arange(24.0).reshape(4, 6)[:, ::2], torch.zeros(0), None, 0.5]
    torch.save(value, tmp_path / "file.tar")
    found = torchfile.load_mapped(tmp_path / "file.tar")
    np.testing.assert_array_equal(as_array(found[0]), value[0].numpy())
    assert as_array(found[1]).shape == (0,)
    assert found[2:] == [None, 0.5]
    (tmp_path / "bad.tar").write_bytes((tmp_path / "file.tar").read_bytes()[:300])
    for name in ("bad.tar", "none.tar"):
        with pytest.raises(BrokenFileError):
            torchfile.load_mapped(tmp_path / name)


def test_plain_python_values_are_read():
    value = (7, [{"params": [None, (1, 2), True, -3, 2**40], "prob": ([0.5, 1e-9], ["é"])}], {})
    for protocol in (2, 4):
        assert loads(saved(value, pickle_protocol=protocol)) == value
    assert loads(saved((np.int64(-5), np.float32(0.5)), pickle_protocol=4)) == (-5, 0.5)


def structured(state: tuple) -> bytes:
    """An array whose number type is given a state."""

    class Type:
        def __reduce__(self):
            return np.dtype, ("f4", False, True), (3, *state)

    class Array:
        def __reduce__(self):
            values = (1, (4,), Type(), False, b"abcd" * 4)
            return np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), values

    return pickle.dumps(Array(), 2)


class Runs:
    """A pickle that calls something when it is loaded."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    "call",
    [
        (os.system, "touch {}"),
        (eval, "open('{}', 'w')"),
        (exec, "open('{}', 'w')"),
        (os.mkdir, "{}"),
        (getattr, os, "mkdir"),
        (np.load, "{}"),
        (torch.load, "{}"),
    ],
    ids=lambda call: f"{call[0].__module__}.{call[0].__name__}",
)
def test_a_file_that_wants_to_call_something_is_refused_and_nothing_runs(tmp_path, call, protocol):
    mark = tmp_path / "ran"
    function, *args = call
    args = [a.format(mark) if isinstance(a, str) else a for a in args]
    if function is getattr:
        args = [pickle, "loads"]  # a module cannot be pickled; its name is refused all the same
        text = b"\x80\x02c__builtin__\ngetattr\n(cos\npath\nX\x04\x00\x00\x00joint\x85R."
    else:
        text = pickle.dumps([Runs(function, *args)], protocol=protocol)
    assert refused(packed(text)).code == "unsafe-label"
    assert not mark.exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a name below an allowed one", b"\x80\x04\x8c\x05numpy\x8c\x0bndarray.dot\x93."),
        ("an allowed module's other function", b"\x80\x02cnumpy\nload\n."),
        ("attributes of a function set", b"\x80\x02c_codecs\nencode\n}X\x01\x00\x00\x00a\x4b\x01sb."),
        ("state of the array type set", b"\x80\x02cnumpy\nndarray\n}b."),
        ("slots of a storage type set", b"\x80\x02ctorch\nFloatStorage\nN}X\x06\x00\x00\x00valuesNs\x86b."),
        ("the instance opcode", b"\x80\x02(i__builtin__\nlist\n."),
        ("the object opcode", b"\x80\x02(c__builtin__\nlist\no."),
        ("the new-object opcode", b"\x80\x02cnumpy\nndarray\nK\x00\x85\x81."),
        ("the extension opcode", b"\x80\x02\x82\x01."),
        ("a text reference", b"\x80\x02Pstorage\n."),
        ("text opcodes", b"I12\n."),
        ("text that is repeated in other bytes", b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x06\x00\x00\x00latin2\x86R."),
        ("another text encoding", b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00utf-7\x86R."),
        ("a float of two objects", structured(("|", (np.dtype("O"), (2,)), None, None, -1, -1, 0))),
        ("a float with fields", structured(("|", None, ("a",), {}, -1, -1, 0))),
        ("memory by its size", b"\x80\x02c__builtin__\nbytearray\nJ\x00\x00\x00\x7f\x85R."),
        ("objects in an array", pickle.dumps(np.array([None, 1], dtype=object), 2)),
        ("a structured array", pickle.dumps(np.zeros(2, dtype=[("a", "f4")]), 2)),
        ("dates", pickle.dumps(np.zeros(2, dtype="M8[s]"), 2)),
    ],
)  # fmt: skip
def test_what_plain_data_do_not_need_is_refused(name, text):
    assert refused(packed(text)).code == "unsafe-label"


@pytest.mark.parametrize(
    "text",
    [
        b"\x80\x02}K\x01K\x02\x86b.",  # state of a dict: no such attribute
        b"\x80\x02]}X\x01\x00\x00\x00aNsb.",  # attributes of a list
        b"\x80\x02R.",  # nothing to call
        b"\x80\x02h\x07.",  # nothing remembered
        b"\x80\x02K\x01",  # no end
        b"\x80\x02X\xff\xff\xff\x7fa.",  # a length beyond the end
        b"\x80\x02K\x01Q.",  # a reference that is not a storage
        b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x04\x00\x00\x00../1X\x03\x00\x00\x00cpuK\x01tQ.",
        b"\x80\x02]\x95\xff.",  # a frame that is cut off
        pickle.dumps(np.zeros(3), 2).replace(b"K\x03", b"K\x04", 1),
    ],
)
def test_nonsense_is_a_broken_file_not_a_crash(text):
    assert refused(packed(text)).code in ("broken-label", "unsafe-label")


def tensor_pickle(shape, strides, offset=0, count=4) -> bytes:
    """A tensor with any claims about its storage of four floats."""

    class Tensor:
        def __reduce__(self):
            hooks = OrderedDict()
            return torch._utils._rebuild_tensor_v2, (STORAGE, offset, shape, strides, False, hooks)

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            if value is STORAGE:
                return ("storage", torch.FloatStorage, "0", "cpu", count)
            return None

    file = io.BytesIO()
    Pickler(file, protocol=2).dump(Tensor())
    return packed(file.getvalue(), [("data/0", struct.pack("<4f", 1, 2, 3, 4))])


STORAGE = object()


def test_a_tensor_stays_inside_its_storage():
    np.testing.assert_array_equal(as_array(loads(tensor_pickle((2, 2), (2, 1)))), [[1, 2], [3, 4]])
    for wrong in (
        tensor_pickle((5,), (1,)),
        tensor_pickle((2,), (1,), offset=3),
        tensor_pickle((2, 2), (3, 1)),
        tensor_pickle((4,), (1,), count=5),
        tensor_pickle((2,), (1,), offset=-1),
        tensor_pickle((2,), (-1,), offset=3),
        tensor_pickle((2,), (1, 1)),
    ):
        refused(wrong)


def test_small_files_that_claim_huge_arrays_are_refused():
    assert "exceed" in str(refused(tensor_pickle((2**30, 2**9), (0, 0))))
    assert "exceed" in str(refused(tensor_pickle((2**41,), (0,))))
    text = pickle.dumps(np.zeros(3), 2).replace(b"K\x03", b"J\xff\xff\xff\x7f", 1)
    refused(packed(text))


def test_views_and_bytes_that_repeat_are_bounded(monkeypatch):
    data = saved(list(torch.zeros(1000).expand(8, 1000)))
    assert len(loads(data)) == 8
    monkeypatch.setattr(torchfile, "MAX_ARRAY_BYTES", 32_000)
    assert len(loads(data)) == 8
    assert "exceeds" in str(refused(saved(torch.zeros(1000).expand(9, 1000))))
    monkeypatch.setattr(torchfile, "MAX_ARRAY_BYTES", 10_000)
    text = (
        b"c_codecs\nencode\nq\x00X\xe8\x03\x00\x00"
        + b"a" * 1000
        + b"X\x06\x00\x00\x00latin1\x86q\x01R"
    )
    assert "exceed" in str(refused(packed(b"\x80\x02(" + text + b"h\x00h\x01R" * 10 + b"t.")))
    assert "exceed" in str(refused(saved([torch.zeros(1000), torch.ones(2000)])))


def test_compressed_members_are_refused():
    bomb = packed(b"\x80\x02X\x00\x00\x01\x00" + b"a" * 2**16 + b".", (), zipfile.ZIP_DEFLATED)
    assert "compressed" in str(refused(bomb))


def test_every_truncation_and_any_changed_byte_of_the_numbers_is_noticed():
    data = saved([torch.arange(50.0), torch.ones(50, dtype=torch.bool)])
    for length in range(0, len(data) - 1, 7):
        assert refused(data[:length]).code == "broken-label"
    at = data.index(np.arange(50, dtype="f4").tobytes())
    for k in range(at, at + 200, 13):
        assert refused(data[:k] + bytes([data[k] ^ 1]) + data[k + 1 :]).code == "broken-label"


def test_what_is_no_torch_file_says_so():
    assert "not a torch file" in str(refused(b"hello"))
    assert "before 1.6" in str(refused(saved([1], _use_new_zipfile_serialization=False)))
    assert "big-endian" in str(refused(packed(b"\x80\x02N.", [("byteorder", b"big")])))
    empty = io.BytesIO()
    zipfile.ZipFile(empty, "w").close()
    assert "data.pkl" in str(refused(empty.getvalue()))


def test_a_large_memo_index_takes_no_memory():
    assert loads(packed(b"\x80\x02K\x01r\xff\xff\xff\xff.")) == 1


def test_torchs_own_reader_does_not_do_as_well():
    """Once this fails, `torch.load(weights_only=True)` may do; see the module's docstring."""

    def weights(data: bytes):
        return torch.load(io.BytesIO(data), weights_only=True)

    mldr = saved((0, [{"params": [(0, 0, 4, 4), False]}]), pickle_protocol=4)
    assert loads(mldr)[0] == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(pickle.UnpicklingError):
            weights(mldr)
    assert weights(packed(b"\x80\x02c__builtin__\nbytearray\nK\x09\x85R.")) == bytearray(9)
    assert weights(packed(b"\x80\x02K\x01.", (), zipfile.ZIP_DEFLATED)) == 1
    data = saved(torch.arange(50.0))
    at = data.index(np.float32(17).tobytes())
    assert weights(data[:at] + b"\x01" + data[at + 1 :])[17] != 17


def test_as_array_takes_nothing_but_arrays():
    for value in (None, [1.0], {}, "text", torchfile._Array()):
        with pytest.raises(BrokenFileError):
            as_array(value)


def test_a_git_lfs_pointer_is_called_one(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    assert refused(pointer).code == "git-lfs"
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.tar").write_bytes(pointer)
    for source in (tmp_path / "labels", tmp_path / "labels" / "a.tar"):
        for name in interchange.IMPORTS:
            with pytest.raises(LabelsError, match=r"a.tar is a git-lfs pointer.*git lfs pull"):
                interchange.open_labels(name, source, None, ImportSettings())
