"""The header of a GGUF file, which holds a whole model: its metadata, and where each tensor is and how it is stored.

    magic, version, counts | key, type, value ... | name, dimensions, type, offset ... | padding | tensor data

No tensor is read here, and everything is checked against the size of the file, so a file that is truncated or not a
GGUF is refused before any memory is allocated. (The gguf library has a reader, too. It makes an array of every string:
for the 49,152 tokens of SmolLM2 that takes seconds and 160 MB. Block sizes and dequantisation are the library's.)
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paged_infer.model.loading.safetensors import StoredTensor
from paged_infer.model.shard import refusal

VERSIONS = (2, 3)
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TENSOR_TYPES = (*FLOATS, "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
MAX_DIMS = 4
CHUNK_ELEMENTS = 2**18  # dequantised at a time

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class GgufTensor(StoredTensor):
    """A tensor of a GGUF file. ``name``, ``shape`` and ``dtype`` are those of the tensor that ``read`` returns.

    Attributes:
        tensor_type: how it is stored, one of ``TENSOR_TYPES``.
        stored_shape: its shape in the file; each row is a whole number of blocks.
        offset: the position of its first byte in the file.
        row_bytes: bytes of a stored row.
        change: turns the dequantised tensor into that of a transformers checkpoint; None: it is equal already.
        is_kept: ``read`` returns the blocks of each row, uint8 [rows, row_bytes], instead of dequantising them.
    """

    tensor_type: str
    stored_shape: tuple[int, ...]
    offset: int
    row_bytes: int
    change: Callable[[Tensor], Tensor] | None = None
    is_kept: bool = False

    def blocks(self) -> np.ndarray:
        """All rows as they are stored, uint8 [rows, row_bytes]; a memory map, so nothing is read yet."""
        shape = (prod(self.stored_shape[:-1]), self.row_bytes)
        try:
            return np.memmap(self.path, np.uint8, "r", self.offset, shape)
        except (OSError, ValueError) as error:  # the file has changed since its header was read
            raise ValueError(f"{self.path}: {self.name} cannot be read ({error})") from None

    def read(self) -> Tensor:
        """The tensor as a transformers checkpoint has it: floats in their own dtype, every other type as float32.

        If a matrix has a ``cut``, only the blocks of that part are read, so ``change`` must work on the rows of some
        heads alone. Tensors of other dimensions are read whole, then cut.

        Raises:
            ValueError: the file cannot be read, or a rank would need part of a block that is kept.
        """
        if self.cut is None or len(self.stored_shape) != 2:
            tensor = self._read(self.blocks(), self.stored_shape)
            return tensor if self.cut is None else self.cut.take(tensor)
        rows, (columns,) = self.cut.ranges if self.change is not Tensor.t else self.cut.ranges[::-1]
        elements = self.block_elements
        first, last = columns.start // elements, -(-columns.stop // elements)
        if self.is_kept and (columns.start % elements or columns.stop % elements):
            raise ValueError(refusal(self.name, self.cut, self.stored_shape[1], elements, "columns"))
        size = self.row_bytes * elements // self.stored_shape[1]
        stored = self.blocks()
        blocks = np.concatenate([stored[r.start : r.stop, first * size : last * size] for r in rows])
        tensor = self._read(blocks, (len(blocks), (last - first) * elements))
        if self.is_kept:
            return tensor
        own = slice(columns.start - first * elements, columns.stop - first * elements)
        return tensor[own] if self.change is Tensor.t else tensor[:, own]

    @property
    def block_elements(self) -> int:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        return GGML_QUANT_SIZES[GGMLQuantizationType[self.tensor_type]][0]

    def _read(self, blocks: np.ndarray, shape: tuple[int, ...]) -> Tensor:
        if self.is_kept:
            tensor = torch.from_numpy(np.array(blocks))
            return tensor if self.change in (None, Tensor.t) else self.change(tensor)
        if self.tensor_type in FLOATS:
            tensor = torch.from_numpy(np.array(blocks)).view(FLOATS[self.tensor_type])
        else:
            tensor = _dequantised(blocks, self.tensor_type, shape[-1])
        tensor = tensor.reshape(shape)
        return tensor if self.change is None else self.change(tensor)


def _dequantised(blocks: np.ndarray, tensor_type: str, columns: int) -> Tensor:
    """float32 [rows, columns], some rows at a time, because the library's temporaries take several times its result."""
    from gguf import GGMLQuantizationType, dequantize

    out = np.empty((len(blocks), columns), np.float32)
    rows = max(1, CHUNK_ELEMENTS // columns)
    with np.errstate(invalid="ignore", over="ignore"):  # scales may be NaN or inf; logits of NaN end their request
        for first in range(0, len(blocks), rows):
            part = blocks[first : first + rows]
            # As one long row, since the library loops over groups of 16 rows.
            values = dequantize(part.reshape(1, -1), GGMLQuantizationType[tensor_type])
            out[first : first + rows] = values.reshape(-1, columns)
    return torch.from_numpy(out)


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The header of a GGUF file: metadata by key, tensors by their name in the file."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def is_gguf(path: Path) -> bool:
    """Whether the path is a file, which is then read as GGUF; a checkpoint in Hugging Face format is a folder."""
    return path.is_file()


def read_gguf(path: Path) -> GgufFile:
    """The header of ``path``.

    Raises:
        ValueError: not a GGUF, truncated, of another version, or with a tensor of an unsupported type or impossible
            size; the message names the file and the value.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size < 4:
                raise ValueError(f"{path}: not a GGUF file (it has {size} bytes)")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Header(path, data).read()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None


class _Header:
    """Reads a header from its start to its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.size = path, data, len(data)
        self.position = 0
        self.part = "header"

    def read(self) -> GgufFile:
        magic = self.data[:4]
        if magic != b"GGUF":
            raise ValueError(f"{self.path}: not a GGUF file (it begins with {magic!r}, not b'GGUF')")
        self.position = 4
        (version,) = self._unpack("I")
        if version not in VERSIONS:
            hint = "; it may be big-endian" if version % 2**16 == 0 else ""
            raise ValueError(
                f"{self.path}: GGUF version {version}: must be one of {', '.join(map(str, VERSIONS))}{hint}"
            )
        num_tensors, num_keys = self._unpack("QQ")
        metadata: dict[str, Any] = {}
        for index in range(num_keys):
            self.part = f"metadata, key {index} of {num_keys}"
            key = self._string()
            self.part = f"metadata, {key!r}"
            if key in metadata:
                raise ValueError(f"{self.path}: key {key!r} is stored twice")
            metadata[key] = self._value(*self._unpack("I"))
        described = [self._tensor(index, num_tensors) for index in range(num_tensors)]
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"{self.path}: general.alignment={alignment!r}: must be a power of two")
        start = -(-self.position // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, tensor_type, offset in described:
            if name in tensors:
                raise ValueError(f"{self.path}: tensor {name!r} is stored twice")
            tensors[name] = self._located(name, shape, tensor_type, start + offset)
        return GgufFile(self.path, metadata, tensors)

    def _unpack(self, form: str) -> tuple[Any, ...]:
        form = f"<{form}"
        end = self.position + struct.calcsize(form)
        self._check(end)
        values = struct.unpack_from(form, self.data, self.position)
        self.position = end
        return values

    def _check(self, end: int) -> None:
        if end > self.size:
            raise ValueError(f"{self.path}: truncated in its {self.part}: {end} bytes needed, the file has {self.size}")

    def _string(self) -> str:
        start = self.position + 8
        self.position = start + int.from_bytes(self.data[start - 8 : start], "little")
        self._check(self.position)
        try:
            return self.data[start : self.position].decode()
        except UnicodeDecodeError:
            raise ValueError(f"{self.path}: {self.part}: bytes {start} to {self.position} are not UTF-8") from None

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            of, length = self._unpack("IQ")
            if of == _STRING:
                self._check(self.position + 8 * length)
                return [self._string() for _ in range(length)]
            if of in _NUMBERS:
                self._check(self.position + length)  # before a format string of an impossible length is built
                return list(self._unpack(f"{length}{_NUMBERS[of]}"))
            kind = of
        elif kind in _NUMBERS:
            (value,) = self._unpack(_NUMBERS[kind])
            # 1e-5 is stored as the nearest float32; the shortest decimal that rounds to it is the number as written.
            return float(str(np.float32(value))) if kind == _FLOAT32 else value
        raise ValueError(f"{self.path}: {self.part} has values of type {kind}, which is not supported")

    def _tensor(self, index: int, of: int) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, type and offset of the next tensor. GGUF has the fastest dimension first, torch has it last."""
        self.part = f"list of tensors, tensor {index} of {of}"
        name = self._string()
        (num_dims,) = self._unpack("I")
        if not 1 <= num_dims <= MAX_DIMS:
            raise ValueError(f"{self.path}: tensor {name!r} has {num_dims} dimensions: must be 1 to {MAX_DIMS}")
        shape = self._unpack(f"{num_dims}Q")[::-1]
        tensor_type, offset = self._unpack("IQ")
        return name, shape, tensor_type, offset

    def _located(self, name: str, shape: tuple[int, ...], number: int, offset: int) -> GgufTensor:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        names = {member.value: member.name for member in GGMLQuantizationType}
        tensor_type = names.get(number, str(number))
        if tensor_type not in TENSOR_TYPES:
            known = ", ".join(TENSOR_TYPES)
            raise ValueError(f"{self.path}: tensor {name!r} has type {tensor_type}: must be one of {known}")
        elements, num_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[tensor_type]]
        if 0 in shape or shape[-1] % elements:
            limit = f"the length of rows must be a multiple of {elements} for {tensor_type}"
            raise ValueError(f"{self.path}: tensor {name!r} is {list(shape)}: {limit}")
        row_bytes = shape[-1] // elements * num_bytes
        self.part = f"data of tensor {name!r}"
        self._check(offset + prod(shape[:-1]) * row_bytes)
        dtype = tensor_type if tensor_type in FLOATS else "F32"
        return GgufTensor(name, shape, dtype, self.path, tensor_type, shape, offset, row_bytes)
