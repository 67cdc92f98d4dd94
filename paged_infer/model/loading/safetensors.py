"""The safetensors of a checkpoint: which files are read, their headers, the tensors themselves; and writing one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from paged_infer.model.config_reader import read_json
from paged_infer.model.shard import Cut

INDEX = "model.safetensors.index.json"
_MAPPED_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as its file's header describes it; ``dtype`` as safetensors names it ("F32", "BF16", "I8", ...).

    Attributes:
        cut: the part to read; None: the whole tensor.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    path: Path
    cut: Cut | None = field(default=None, kw_only=True)


def weight_files(folder: Path) -> list[Path]:
    """The checkpoint's safetensors: model.safetensors if it exists, or else the files that the index names.

    Raises:
        ValueError: files are missing, or the index names none; the message names them.
    """
    index_path, paths = folder / INDEX, [folder / "model.safetensors"]
    if index_path.is_file() and not paths[0].is_file():
        weight_map = read_json(index_path).get("weight_map")
        names = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
        if not names:
            raise ValueError(f"{index_path}: lacks 'weight_map', so it names no weight files")
        paths = [folder / name for name in sorted(names)]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ValueError(f"{folder}: weight file {', '.join(missing)} is missing (only safetensors are read)")
    return paths


def list_tensors(folder: Path) -> list[StoredTensor]:
    """All tensors, as the headers of the weight files list them; no weights are read.

    Raises:
        ValueError: a file is missing, truncated or unreadable, or the folder also has an adapter.
    """
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder}: has an adapter (adapter_config.json), which is not supported: merge it first")
    tensors = []
    for path in weight_files(folder):
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 (a safe_open handle is not a mapping)
                header = file.get_slice(name)
                tensors.append(StoredTensor(name, tuple(header.get_shape()), header.get_dtype(), path))
    return tensors


def read_tensors(wanted: Mapping[str, StoredTensor]) -> Iterator[tuple[str, Tensor]]:
    """Read each tensor of ``wanted``, or the part given by its ``cut``, as stored, one at a time: (key, tensor).

    A file is mapped into memory, and pages that have been read count as the process's memory until it is closed. So it
    is closed and opened again every ``_MAPPED_BYTES``.
    """
    for path in dict.fromkeys(stored.path for stored in wanted.values()):
        left = [(key, stored) for key, stored in wanted.items() if stored.path == path]
        left.reverse()
        while left:
            num_bytes = 0
            with _opened(path) as file:
                while left and num_bytes < _MAPPED_BYTES:
                    key, stored = left.pop()
                    tensor = _read(file, stored)
                    num_bytes += tensor.nbytes
                    yield key, tensor
                    del tensor  # it keeps the mapping


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as safetensors, perhaps truncated ({error})") from None


def _read(file: Any, stored: StoredTensor) -> Tensor:
    try:
        return file.get_tensor(stored.name) if stored.cut is None else stored.cut.take(file.get_slice(stored.name))
    except (SafetensorError, OSError) as error:  # a dtype that torch lacks, or a file that changed since
        raise ValueError(f"{stored.path}: {stored.name} of {stored.dtype} cannot be read ({error})") from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write ``tensors`` to a file that other users can read, too, as far as its folder allows.

    Raises:
        OSError: it cannot be written, for example because the disk is full.
    """
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written ({error})") from None
    path.chmod(0o644)
