"""Read files of `torch.save` without torch and without executing anything in them.

Such a file is a zip of one pickle and the raw data of its tensors. A pickle is a program whose
opcodes can import and call anything. The unpickler below accepts only the opcodes of plain data and
the few names that label files need. These names map to functions of this module, which check shapes
and sizes.

Why not `torch.load(weights_only=True)` with NumPy's names on its allow-list, as of torch 2.15:

- It reads only pickle protocol 2, and ml-dr writes protocol 4.
- `numpy.dtype` on an allow-list accepts any state. With a state in which a float consists of two
  objects, NumPy uses bytes of the file as addresses, and the process crashes.
- `bytearray` is always allowed, and compressed members are decompressed: a file of 200 bytes can
  fill the memory.
- Its allow-list is global to the process, and label files are read in threads.
- Checksums are not verified, so changed numbers go unnoticed.

Why not `torch.load(pickle_module=...)` with this unpickler: it passes TorchScript archives to
another loader, which executes them.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
from numpy.lib.stride_tricks import as_strided

from fkdpipe.common import disk

MAX_FILE_BYTES = 2**28  # far above any label file
MAX_ARRAY_BYTES = 2**28  # of all storages and bytes together, and of one view

_NUMBERS = {
    code: np.dtype(code).newbyteorder("<")
    for code in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1")
}

Buffer = bytes | np.ndarray


class BrokenFileError(ValueError):
    """A label file that cannot be used. `code` is stable, the message is for people."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code


def loads(data: bytes) -> Any:
    """The object in a torch file: numbers, text, lists, tuples and dicts; see `as_array`.

    Raises:
        BrokenFileError: "broken-label" (not a torch file, truncated, a wrong checksum) or
            "unsafe-label" (it uses something that plain data do not need).
    """
    if len(data) > MAX_FILE_BYTES:
        raise BrokenFileError("broken-label", f"{len(data)} bytes is too large for a label file")
    return _load(io.BytesIO(data))


def load_mapped(path: Path) -> Any:
    """`loads` of a file whose tensors stay on disk until their values are used.

    Their checksums are not verified, since that would read them.

    Raises:
        BrokenFileError: as `loads`, or the file cannot be opened.
    """
    try:
        with open(path, "rb") as file:
            return _load(file, mapped=path)
    except OSError as error:
        raise BrokenFileError("no-label", f"{path}: {error.strerror or error}") from error


def as_array(value: Any) -> np.ndarray:
    """Convert an array or tensor returned by `loads` to NumPy.

    Raises:
        BrokenFileError: the value is something else.
    """
    if isinstance(value, _Array) and value.value is not None:
        return value.value
    raise BrokenFileError("broken-label", f"a {type(value).__name__} instead of an array")


def _load(file: IO[bytes], mapped: Path | None = None) -> Any:
    try:
        with zipfile.ZipFile(file) as archive:
            return _load_archive(archive, mapped)
    except (BrokenFileError, FileNotFoundError):
        raise
    except zipfile.BadZipFile as error:
        file.seek(0)
        head = file.read(len(disk.LFS_POINTER))
        if head == disk.LFS_POINTER:
            detail = "a git-lfs pointer in place of the file; run `git lfs pull`"
            raise BrokenFileError("git-lfs", detail) from error
        old = head.startswith(b"\x80\x02\x8a\x0a")
        what = "torch's format before 1.6; save it again" if old else f"not a torch file: {error}"
        raise BrokenFileError("broken-label", what) from error
    except Exception as error:  # damaged or malicious files can make the parsers raise anything
        raise BrokenFileError("broken-label", f"{type(error).__name__}: {error}") from error


def _load_archive(archive: zipfile.ZipFile, mapped: Path | None) -> Any:
    members = {info.filename: info for info in archive.infolist()}
    for info in members.values():
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise BrokenFileError("unsafe-label", f"{info.filename} is compressed")
    pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise BrokenFileError("broken-label", "not a torch file: it has no data.pkl")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in members and archive.read(f"{folder}byteorder") != b"little":
        raise BrokenFileError("broken-label", "its numbers are big-endian")

    def storage(name: str) -> Buffer:
        info = members[f"{folder}data/{name}"]
        return archive.read(info) if mapped is None else _map(archive, info, mapped)

    return _Unpickler(archive.read(pickles[0]), storage).load()


def _map(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> Buffer:
    """A member's bytes, memory-mapped from the file."""
    assert archive.fp is not None
    archive.fp.seek(info.header_offset + 26)  # lengths of the name and extra field before the bytes
    begin = info.header_offset + 30 + sum(struct.unpack("<HH", archive.fp.read(4)))
    if not info.file_size:
        return b""
    return np.memmap(path, dtype=np.uint8, mode="r", offset=begin, shape=(info.file_size,))


class _Opcodes(dict[int, Callable[..., None]]):
    def __missing__(self, opcode: int) -> NoReturn:
        _refuse(f"opcode {bytes([opcode])!r}")


class _Unpickler(pickle._Unpickler):
    """Executes only the opcodes of plain data, and looks up names only in `_NAMES`.

    It extends Python's unpickler, not the one in C: its opcodes are a table, and its memo is a
    dict. The memo in C allocates memory up to any index that a file names.
    """

    dispatch = _Opcodes({
        opcode[0]: pickle._Unpickler.dispatch[opcode[0]]
        for opcode in (
            pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.NONE, pickle.NEWTRUE,
            pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1,
            pickle.BINFLOAT, pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINBYTES,
            pickle.SHORT_BINBYTES, pickle.EMPTY_LIST, pickle.EMPTY_TUPLE, pickle.EMPTY_DICT,
            pickle.APPEND, pickle.APPENDS, pickle.SETITEM, pickle.SETITEMS, pickle.TUPLE,
            pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.BINPUT, pickle.LONG_BINPUT,
            pickle.BINGET, pickle.LONG_BINGET, pickle.MEMOIZE, pickle.GLOBAL, pickle.STACK_GLOBAL,
            pickle.REDUCE, pickle.BINPERSID,
        )
    })  # fmt: skip

    def __init__(self, text: bytes, storage: Callable[[str], Buffer]) -> None:
        super().__init__(io.BytesIO(text))
        self._storage, self._left = storage, MAX_ARRAY_BYTES

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise BrokenFileError("unsafe-label", f"it uses {module}.{name}")
        value = _NAMES[module, name]
        return self._encode if value is _ENCODE else value

    def persistent_load(self, key: Any) -> np.ndarray:
        """The data of a tensor, from ("storage", type, name, device, count)."""
        _, dtype, name, _, count = key
        if not isinstance(dtype, np.dtype) or not isinstance(name, str) or not name.isdigit():
            _refuse("a reference that is not a storage")
        data = self._storage(name)
        self._spend(len(data))
        if len(data) != count * dtype.itemsize:
            raise BrokenFileError("broken-label", f"storage {name} has {len(data)} bytes")
        return np.frombuffer(data, dtype=dtype)

    def load_build(self) -> None:
        """BUILD could otherwise set attributes of functions."""
        if not isinstance(self.stack[-2], (_Dtype, _Array)):  # type: ignore[attr-defined]
            _refuse("a state for an object that has none")
        pickle._Unpickler.dispatch[pickle.BUILD[0]](self)  # type: ignore[arg-type]

    dispatch[pickle.BUILD[0]] = load_build

    def _encode(self, text: object, encoding: object) -> bytes:
        """Protocol 2 writes bytes as latin1 text."""
        if not isinstance(text, str) or encoding != "latin1":
            _refuse("an unusual encoding")
        self._spend(len(text))
        return text.encode("latin1")

    def _spend(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise BrokenFileError("unsafe-label", f"its arrays exceed {MAX_ARRAY_BYTES} bytes")


class _Dtype:
    """Replaces numpy.dtype, for numeric types only."""

    __slots__ = ("value",)

    def __init__(self, code: object, *rest: object) -> None:
        if not isinstance(code, str) or code not in _NUMBERS or rest != (False, True):
            _refuse("an array of non-numeric values")
        self.value = _NUMBERS[code]

    def __setstate__(self, state: object) -> None:
        plain = (None, None, None, -1, -1, 0)
        order = state[1] if isinstance(state, tuple) and len(state) == 8 else None
        if order not in ("<", ">", "|", "=") or state[2:] != plain:  # type: ignore[index]
            _refuse("a structured data type")
        self.value = self.value.newbyteorder(order)


class _Array:
    """Replaces numpy.ndarray, which is created empty and gets its data as state."""

    __slots__ = ("value",)

    def __init__(self, value: np.ndarray | None = None) -> None:
        self.value = value

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            _refuse("an array without data")
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
            _refuse("an array of non-numeric values")
        sizes = _sizes(shape)
        if math.prod(sizes) * dtype.value.itemsize != len(data):
            raise BrokenFileError("broken-label", f"{len(data)} bytes for an array of {sizes}")
        values = np.frombuffer(data, dtype=dtype.value)
        self.value = values.reshape(sizes, order="F" if fortran is True else "C")


def _tensor(storage: object, offset: object, shape: object, strides: object, *_: object) -> _Array:
    """A view of a storage, after checking that it lies inside the storage."""
    (start,), sizes, steps = _sizes((offset,)), _sizes(shape), _sizes(strides)
    if not isinstance(storage, np.ndarray) or len(sizes) != len(steps):
        _refuse("a tensor without a storage")
    last = start + sum((n - 1) * step for n, step in zip(sizes, steps, strict=True))
    if math.prod(sizes) and last >= len(storage):
        raise BrokenFileError("broken-label", "a tensor reaches beyond its storage")
    if math.prod(sizes) * storage.itemsize > MAX_ARRAY_BYTES:
        raise BrokenFileError("unsafe-label", f"a tensor exceeds {MAX_ARRAY_BYTES} bytes")
    byte_steps = [step * storage.itemsize for step in steps]
    return _Array(as_strided(storage[start:], sizes, byte_steps, writeable=False))


def _sizes(value: object) -> tuple[int, ...]:
    if not isinstance(value, tuple) or not all(type(n) is int and n >= 0 for n in value):
        _refuse("an invalid shape")
    return value


def _scalar(dtype: object, data: object) -> int | float | bool:
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
        _refuse("a number of an unknown type")
    return np.frombuffer(data, dtype=dtype.value, count=1)[0].item()


_ENCODE = object()
_NAMES: dict[tuple[str, str], object] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    **{
        (f"numpy.{core}.multiarray", name): function
        for core in ("core", "_core")  # NumPy 1 and 2
        for name, function in (("_reconstruct", lambda *_: _Array()), ("scalar", _scalar))
    },
    ("_codecs", "encode"): _ENCODE,
    ("__builtin__", "bytes"): lambda: b"",
    ("collections", "OrderedDict"): dict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch", "DoubleStorage"): _NUMBERS["f8"],
    ("torch", "FloatStorage"): _NUMBERS["f4"],
    ("torch", "HalfStorage"): _NUMBERS["f2"],
    ("torch", "LongStorage"): _NUMBERS["i8"],
    ("torch", "IntStorage"): _NUMBERS["i4"],
    ("torch", "ShortStorage"): _NUMBERS["i2"],
    ("torch", "CharStorage"): _NUMBERS["i1"],
    ("torch", "ByteStorage"): _NUMBERS["u1"],
    ("torch", "BoolStorage"): _NUMBERS["b1"],
}


def _refuse(what: str) -> NoReturn:
    raise BrokenFileError("unsafe-label", f"its pickle holds {what}")
