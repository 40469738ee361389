"""Files of `torch.save`, read without torch and without running anything that is in them.

Such a file is a zip of one pickle and the raw numbers of its tensors. A pickle is a program: its
opcodes can import and call anything. So the opcodes are looked at first, and only those that
build plain data may stand there; the few names a label file needs (NumPy's and torch's rebuilding
functions) lead to functions of this module, which make arrays from checked shapes and bytes. Any
other name is refused. Sizes are bounded, and compressed members (a bomb's hiding place, which
torch never writes) are refused.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np

MAX_FILE_BYTES = 2**28  # far above any label file
MAX_ARRAY_BYTES = 2**28  # of all arrays of a file together, views counted at full size

_NUMBERS = {
    **{code: np.dtype(f"<{code}") for code in ("f2", "f4", "f8", "i2", "i4", "i8")},
    **{code: np.dtype(code) for code in ("i1", "u1", "b1")},
}
_STORAGES = {
    "DoubleStorage": "f8",
    "FloatStorage": "f4",
    "HalfStorage": "f2",
    "LongStorage": "i8",
    "IntStorage": "i4",
    "ShortStorage": "i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "b1",
}

# Opcodes of a fixed length that build plain data, call a name or use the memo. LONG_BINPUT is
# bounded, because the memo is allocated up to the largest index.
_PLAIN = re.compile(
    rb"(?:[()\]}aesutNRbQ\x85-\x89\x93\x94]|[\x80Kqh].|M..|[Jj].{4}|r..[\x00-\x0f]\x00"
    rb"|[G\x95].{8})*+",
    re.DOTALL,
)
_COUNTED = {b"X": 4, b"\x8c": 1, b"B": 4, b"C": 1, b"\x8a": 1}  # opcode: bytes of its length
_GLOBAL = re.compile(rb"c[^\n]{1,100}\n[^\n]{1,100}\n")

Buffer = bytes | np.ndarray
Member = Callable[[zipfile.ZipFile, zipfile.ZipInfo], Buffer]  # the bytes of a tensor


class BrokenFileError(ValueError):
    """A label file that is not used. `code` is a stable word, the message is for people."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code


def loads(data: bytes) -> Any:
    """The object in a torch file: numbers, text, lists, tuples and dicts; see `as_array`.

    Raises:
        BrokenFileError: "broken-label" (not such a file, truncated, a checksum is wrong) or
            "unsafe-label" (it asks for something that plain data do not need).
    """
    if len(data) > MAX_FILE_BYTES:
        raise BrokenFileError("broken-label", f"{len(data)} bytes is too large for a label file")
    return _load(io.BytesIO(data), lambda archive, info: archive.read(info))


def load_mapped(path: Path) -> Any:
    """`loads` of a file whose tensors stay on disk until their values are used.

    Their checksums are not compared, since that would read them.

    Raises:
        BrokenFileError: as `loads`; also when the file cannot be opened.
    """

    def mapped(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
        header = info.header_offset
        assert archive.fp is not None
        archive.fp.seek(header + 26)  # lengths of the name and of what else precedes the bytes
        begin = header + 30 + sum(struct.unpack("<HH", archive.fp.read(4)))
        if not info.file_size:
            return np.empty(0, dtype=np.uint8)
        return np.memmap(path, dtype=np.uint8, mode="r", offset=begin, shape=(info.file_size,))

    try:
        with open(path, "rb") as file:
            return _load(file, mapped)
    except OSError as error:
        raise BrokenFileError("no-label", f"{path}: {error.strerror or error}") from error


def _load(file: IO[bytes], member: Member) -> Any:
    try:
        with zipfile.ZipFile(file) as archive:
            return _load_archive(archive, member)
    except (BrokenFileError, FileNotFoundError):
        raise
    except zipfile.BadZipFile as error:
        file.seek(0)
        old = file.read(4) == b"\x80\x02\x8a\x0a"
        what = "torch's format before 1.6; save it again" if old else f"no torch file: {error}"
        raise BrokenFileError("broken-label", what) from error
    except Exception as error:  # a damaged or hostile file can raise whatever the parsers raise
        raise BrokenFileError("broken-label", f"{type(error).__name__}: {error}") from error


def as_array(value: Any) -> np.ndarray:
    """An array out of what `loads` gave.

    Raises:
        BrokenFileError: there is something else, or an array whose numbers never came.
    """
    if isinstance(value, _Array) and value.value is not None:
        return value.value
    raise BrokenFileError("broken-label", f"a {type(value).__name__} where an array belongs")


def _load_archive(archive: zipfile.ZipFile, member: Member) -> Any:
    members = {info.filename: info for info in archive.infolist()}
    for info in members.values():
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise BrokenFileError("unsafe-label", f"{info.filename} is compressed")
    pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise BrokenFileError("broken-label", "no torch file: it has no data.pkl")
    prefix = pickles[0].removesuffix("data.pkl")
    if f"{prefix}byteorder" in members and archive.read(f"{prefix}byteorder") != b"little":
        raise BrokenFileError("broken-label", "its numbers are big-endian")
    text = archive.read(pickles[0])
    check_opcodes(text)
    return _Reader(text, lambda key: member(archive, members[f"{prefix}data/{key}"])).load()


def check_opcodes(text: bytes) -> None:
    """Refuse a pickle with an opcode that plain data do not need.

    Raises:
        BrokenFileError: naming the opcode and its place.
    """
    at = 0
    while True:
        found = _PLAIN.match(text, at)
        assert found is not None  # it matches nothing at all, too
        at = found.end()
        opcode = text[at : at + 1]
        if opcode == b"." and at + 1 == len(text):
            return
        if opcode in _COUNTED:
            begin = at + 1 + _COUNTED[opcode]
            at = begin + int.from_bytes(text[at + 1 : begin], "little")
        elif (name := _GLOBAL.match(text, at)) is not None:
            at = name.end()
        else:
            what = f"opcode {opcode!r} at byte {at}" if at < len(text) else "no end"
            raise BrokenFileError("unsafe-label", f"its pickle has {what}")


class _Fixed:
    """Something a pickle can name; its state cannot be set, which BUILD would do otherwise."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        raise BrokenFileError("unsafe-label", "its pickle changes what it may only use")


class _Function(_Fixed):
    """A function of this module that a pickle may call."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)


class _Storage(_Fixed):
    """The type of a torch storage, then its numbers."""

    __slots__ = ("values",)

    def __init__(self, values: np.ndarray) -> None:
        self.values = values


class _Dtype:
    """numpy.dtype of a number."""

    __slots__ = ("value",)

    def __init__(self, code: object, *rest: object) -> None:
        if not isinstance(code, str) or code not in _NUMBERS or rest != (False, True):
            _refuse(f"numbers of type {code!r}")
        self.value = _NUMBERS[code]

    def __setstate__(self, state: object) -> None:
        plain = (None, None, None, -1, -1, 0)
        order = state[1] if isinstance(state, tuple) and len(state) == 8 else None
        if order not in ("<", ">", "|", "=") or state[2:] != plain:  # type: ignore[index]
            _refuse("a structured number type")
        if order == ">":
            self.value = self.value.newbyteorder(">")


class _Array:
    """An array in the making: NumPy creates it empty and sends its numbers as state."""

    __slots__ = ("_spend", "value")

    def __init__(self, spend: Callable[[int], None], value: np.ndarray | None = None) -> None:
        self._spend, self.value = spend, value

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            _refuse("an array without numbers")
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
            _refuse("an array that is not made of numbers")
        sizes = _shape(shape)
        size = math.prod(sizes) * dtype.value.itemsize
        if size != len(data):
            raise BrokenFileError("broken-label", f"{len(data)} bytes for an array of {shape}")
        self._spend(size)
        values = np.frombuffer(data, dtype=dtype.value)
        self.value = values.reshape(sizes, order="F" if fortran is True else "C")


class _Reader(pickle.Unpickler):
    """Runs a pickle whose opcodes were checked; names lead to this module only."""

    def __init__(self, text: bytes, member: Callable[[str], Buffer]) -> None:
        super().__init__(io.BytesIO(text))
        self._member, self._left = member, MAX_ARRAY_BYTES
        self._names: Mapping[tuple[str, str], object] = {
            ("numpy", "ndarray"): _ARRAY_TYPE,
            ("numpy", "dtype"): _Function(_Dtype),
            ("_codecs", "encode"): _Function(self._encode),
            ("__builtin__", "bytes"): _Function(_empty_bytes),
            ("collections", "OrderedDict"): _Function(_empty_dict),
            ("torch._utils", "_rebuild_tensor_v2"): _Function(self._tensor),
            **{
                (f"numpy.{core}.multiarray", name): _Function(function)
                for core in ("core", "_core")  # NumPy 1 and 2
                for name, function in (("_reconstruct", self._array), ("scalar", _scalar))
            },
            **{("torch", name): _STORAGE_TYPES[name] for name in _STORAGES},
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._names:
            raise BrokenFileError("unsafe-label", f"it asks for {module}.{name}")
        return self._names[module, name]

    def persistent_load(self, key: Any) -> Any:
        """The numbers of a tensor: ("storage", type, name, device, how many)."""
        if not isinstance(key, tuple) or len(key) != 5 or not isinstance(key[1], _Storage):
            _refuse("a reference that is no storage")
        _, kind, name, _, count = key
        if not isinstance(name, str) or not name.isdigit():
            _refuse(f"a storage named {name!r}")
        data = self._member(name)
        self._spend(len(data))
        if len(data) != count * kind.values.itemsize:
            raise BrokenFileError("broken-label", f"storage {name} has {len(data)} bytes")
        return _Storage(np.frombuffer(data, dtype=kind.values.dtype))

    def _spend(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise BrokenFileError("unsafe-label", f"its arrays exceed {MAX_ARRAY_BYTES} bytes")

    def _encode(self, text: object, encoding: object) -> bytes:
        """Protocol 2 writes bytes as text of their 256 values."""
        if not isinstance(text, str) or encoding != "latin1":
            _refuse("an unusual encoding")
        self._spend(len(text))
        return text.encode("latin1")

    def _array(self, kind: object, shape: object, code: object) -> _Array:
        if kind is not _ARRAY_TYPE:
            _refuse("an array of an unknown class")
        return _Array(self._spend)

    def _tensor(
        self, storage: object, offset: object, shape: object, strides: object, *rest: object
    ) -> _Array:
        """A view of a storage, once offset, shape and strides are known to lie inside it."""
        sizes, steps = _shape(shape), _shape(strides)
        if not isinstance(storage, _Storage) or type(offset) is not int or offset < 0:
            _refuse("a tensor without a storage")
        if len(sizes) != len(steps):
            _refuse("a tensor with strides of another length")
        last = offset + sum((n - 1) * step for n, step in zip(sizes, steps, strict=True))
        values = storage.values
        if math.prod(sizes) and last >= len(values):
            raise BrokenFileError("broken-label", "a tensor reaches beyond its storage")
        self._spend(math.prod(sizes) * values.itemsize)
        if not math.prod(sizes):
            return _Array(self._spend, np.empty(sizes, dtype=values.dtype))
        byte_steps = [step * values.itemsize for step in steps]
        view = np.lib.stride_tricks.as_strided(values[offset:], sizes, byte_steps, writeable=False)
        return _Array(self._spend, np.ascontiguousarray(view).reshape(sizes))


_ARRAY_TYPE = _Fixed()
_STORAGE_TYPES = {
    name: _Storage(np.empty(0, dtype=_NUMBERS[code])) for name, code in _STORAGES.items()
}


def _shape(value: object) -> tuple[int, ...]:
    if not isinstance(value, tuple) or len(value) > 8:
        _refuse("a shape that is none")
    if not all(type(n) is int and 0 <= n < 2**40 for n in value):
        _refuse("a shape that is none")
    return value


def _scalar(dtype: object, data: object) -> int | float | bool:
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
        _refuse("a number of an unknown type")
    if len(data) != dtype.value.itemsize:
        raise BrokenFileError("broken-label", "a number of the wrong length")
    return np.frombuffer(data, dtype=dtype.value)[0].item()


def _empty_dict() -> dict:
    return {}


def _empty_bytes() -> bytes:
    return b""


def _refuse(what: str) -> NoReturn:
    raise BrokenFileError("unsafe-label", f"its pickle holds {what}")
