"""Measured tiles: kernels/tiles/sm90.json, read once in a process. Without an entry there, ``tiles`` chooses.

    {"arch": 90, "measured": "NVIDIA H200, triton 3.6.0, 2026-12-01", "entries": [
     {"kernel": "decode", "dtype": "bfloat16", "head_dim": 128, "group": 4,
      "block_m": 16, "block_n": 32, "num_warps": 4, "num_stages": 6,
      "splits": {"per_processor": 4, "min_keys": 256, "max_splits": 64}}
    ]}

An entry of a product with quantised weights (``quant.gemm``) has no head_dim and no group, but whether it is for few
tokens: {"kernel": "w4a16", "dtype": "bfloat16", "few": true, "block_m": 64, ...}.

``paged-infer bench kernels --sweep`` writes such a file. ``PAGED_INFER_TILES=file.json`` replaces the package's table
of the architecture that the file names. A tile that no kernel could run is refused when the table is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from paged_infer.files import replacing
from paged_infer.kernels.ahead_of_time import SHARED_LIMIT

FOLDER = Path(__file__).parents[1] / "tiles"
VARIABLE = "PAGED_INFER_TILES"
KERNELS = ("flash", "prefill", "decode")
LINEAR_KERNELS = ("w4a16", "w8a16", "w8a8")  # bits of the weights and of x; 8 bits are int8 or float8
DTYPES = ("float32", "float16", "bfloat16")
MAX_HEAD_DIM = 256
TMA_HEAD_DIMS = (64, 128)


class Tile(NamedTuple):
    """The constants of a compiled kernel."""

    block_m: int  # queries of one head; in a decode, query heads of one KV head; in a linear layer, tokens
    block_n: int  # keys; in a linear layer, rows of W
    num_warps: int
    num_stages: int  # of the pipeline that loads keys and values, or codes and tokens
    use_tma: bool = False  # flash: TMA loads keys and values, where it can (``flash_tma``)


class SplitRule(NamedTuple):
    """Into how many splits a decode cuts its rows."""

    per_processor: int = 4  # programs of a split decode that a processor holds at once
    min_keys: int = 256  # a split has at least about this many keys
    max_splits: int = 64


class LinearKey(NamedTuple):
    """What an entry of one of ``LINEAR_KERNELS`` is for."""

    kernel: str
    dtype: str  # of x, before it is rounded
    few: bool  # at most ``quant.tiles.FEW_TOKENS``


class Key(NamedTuple):
    """What an entry of an attention kernel is for."""

    kernel: str
    dtype: str
    head_dim: int
    group: int  # query heads of one KV head
    window: bool = False  # flash and prefill; a decode cuts its window before the tiles


AnyKey = Key | LinearKey
Chosen = tuple[Tile, SplitRule | None]  # a decode alone has a rule
_LIMITS = {"block_m": (16, 128), "block_n": (16, 128), "num_warps": (1, 16), "num_stages": (1, 10)}
_SPLIT_LIMITS = {"per_processor": (1, 64), "min_keys": (16, 2**20), "max_splits": (1, 1024)}
_forced: ContextVar[Mapping[str, Chosen]] = ContextVar("forced", default=MappingProxyType({}))  # of this thread


@contextmanager
def forced(kernel: str, tile: Tile, splits: SplitRule | None = None) -> Iterator[None]:
    """All calls of ``kernel`` inside this block take ``tile`` and, if it is given, ``splits``: for a sweep.

    Raises:
        ValueError: there is no such kernel, or the tile is outside the kernels' limits.
    """
    if kernel not in (*KERNELS, *LINEAR_KERNELS):
        raise ValueError(f"kernel={kernel!r}: must be one of {', '.join((*KERNELS, *LINEAR_KERNELS))}")
    _check_tile(tile)
    token = _forced.set({**_forced.get(), kernel: (tile, splits)})
    try:
        yield
    finally:
        _forced.reset(token)


def measured(gpu: tuple[int, int], key: AnyKey) -> Chosen | None:
    """The forced tile, or the entry of the table for ``gpu``; None if there is neither.

    Raises:
        ValueError: the table cannot be read; the message names the file and the entry.
    """
    if (chosen := _forced.get().get(key.kernel)) is not None:
        return chosen
    return None if gpu == (0, 0) else tables().get(gpu[0] * 10 + gpu[1], {}).get(key)


@cache
def tables() -> Mapping[int, Mapping[AnyKey, Chosen]]:
    """All tables by architecture (90: sm90): the package's, one of which the file of ``VARIABLE`` may replace."""
    paths = sorted(FOLDER.glob("sm*.json"))
    found = {}
    for path in paths:
        arch, entries = read_table(path)
        if path.name != f"sm{arch}.json":
            raise ValueError(f'{path}: "arch" is {arch}, so its name must be sm{arch}.json')
        found[arch] = entries
    if given := os.environ.get(VARIABLE):
        if not Path(given).is_file():
            raise ValueError(f"{VARIABLE}={given}: there is no such file")
        found.update([read_table(Path(given))])
    return found


def read_table(path: Path) -> tuple[int, dict[AnyKey, Chosen]]:
    """The architecture and the entries of a table.

    Raises:
        ValueError: it is malformed, or an entry cannot be run; the message names the file and the entry.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        arch, entries = table["arch"], table["entries"]
        if type(arch) is not int or arch not in SHARED_LIMIT or not isinstance(entries, list):
            known = ", ".join(map(str, SHARED_LIMIT))
            raise ValueError(f'"arch" must be one of {known}, and "entries" a list; got arch {arch!r}')
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is not a table of tiles: {reason}") from error
    found: dict[AnyKey, Chosen] = {}
    for number, entry in enumerate(entries, 1):
        try:
            key, chosen = _read_entry(entry, arch)
            if key in found:
                raise ValueError("an earlier entry has the same key")
        except ValueError as error:
            raise ValueError(f"{path}, entry {number}, {json.dumps(entry)}: {error}") from error
        found[key] = chosen
    return arch, found


def write_table(path: Path, arch: int, entries: Mapping[AnyKey, Chosen], measured_on: str) -> None:
    """Write a file for ``kernels/tiles/``. At any moment it is this table or the previous one."""
    lines = []
    for key, (tile, splits) in entries.items():
        entry = key._asdict() | tile._asdict() | ({} if splits is None else {"splits": splits._asdict()})
        if not tile.use_tma:
            del entry["use_tma"]
        lines.append(f"  {json.dumps(entry)}")
    head = f' "arch": {arch},\n "measured": {json.dumps(measured_on)},\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_text(f'{{\n{head} "entries": [\n' + ",\n".join(lines) + "\n ]\n}\n", encoding="utf-8")


def as_key(fields: Sequence[Any]) -> AnyKey:
    """The key that a report keeps as a list."""
    return LinearKey(*fields) if fields[0] in LINEAR_KERNELS else Key(*fields)


def _read_entry(entry: Any, arch: int) -> tuple[AnyKey, Chosen]:
    if isinstance(entry, dict) and entry.get("kernel") in LINEAR_KERNELS:
        return _read_linear_entry(entry)
    allowed = {*Key._fields, *Tile._fields, "splits"}
    if not isinstance(entry, dict) or not allowed >= entry.keys() >= allowed - {"window", "splits", "use_tma"}:
        raise ValueError(f"expected {', '.join(Key._fields + Tile._fields[:4])} and, of a decode, splits")
    key = Key(**{name: entry[name] for name in Key._fields if name in entry})
    tile = Tile(**{name: entry[name] for name in Tile._fields if name in entry})
    if key.kernel not in KERNELS or key.dtype not in DTYPES or not isinstance(key.window, bool):
        raise ValueError(f"kernel must be in {KERNELS}, dtype in {DTYPES}, and window true or false")
    if not _is_whole(key.head_dim, 1, MAX_HEAD_DIM) or not _is_whole(key.group, 1, 2**16):
        raise ValueError(f"head_dim must be a number in 1..{MAX_HEAD_DIM}, and group at least 1")
    if key.kernel == "decode" and key.window:
        raise ValueError("a decode's tile does not depend on a window")
    _check_tile(tile)
    if tile.use_tma and (
        key.kernel != "flash" or key.window or key.dtype == "float32" or key.head_dim not in TMA_HEAD_DIMS or arch < 90
    ):
        raise ValueError("use_tma is for flash on sm90 or later, in 16 bits, head_dim 64 or 128, without a window")
    _check_shared_memory(key, tile, arch)
    return key, (tile, _read_splits(key, entry.get("splits")))


def _read_linear_entry(entry: dict[str, Any]) -> tuple[LinearKey, Chosen]:
    """No tile within the limits is too large for the shared memory of a chip, as stages are no part of the check."""
    names = LinearKey._fields + Tile._fields[:4]
    if entry.keys() != set(names):
        raise ValueError(f"expected {', '.join(names)}")
    key = LinearKey(*(entry[name] for name in LinearKey._fields))
    tile = Tile(*(entry[name] for name in Tile._fields[:4]))
    if key.dtype not in DTYPES or not isinstance(key.few, bool):
        raise ValueError(f"dtype must be in {DTYPES}, and few true or false")
    _check_tile(tile)
    return key, (tile, None)


def _read_splits(key: Key, given: Any) -> SplitRule | None:
    if key.kernel != "decode":
        if given is not None:
            raise ValueError("only a decode has splits")
        return None
    if not isinstance(given, dict) or given.keys() != set(SplitRule._fields):
        raise ValueError(f"splits of a decode: expected {', '.join(SplitRule._fields)}")
    for name, (least, most) in _SPLIT_LIMITS.items():
        if not _is_whole(given[name], least, most):
            raise ValueError(f"splits: {name}={given[name]!r}: must be a number in {least}..{most}")
    return SplitRule(**given)


def _check_tile(tile: Tile) -> None:
    for name, (least, most) in _LIMITS.items():
        number = getattr(tile, name)
        if not _is_whole(number, least, most) or (name != "num_stages" and number.bit_count() != 1):
            kind = "a number" if name == "num_stages" else "a power of two"
            raise ValueError(f"{name}={number!r}: must be {kind} in {least}..{most}")
    if type(tile.use_tma) is not bool:
        raise ValueError(f"use_tma={tile.use_tma!r}: must be true or false")


def _check_shared_memory(key: Key, tile: Tile, arch: int) -> None:
    """Refuse what cannot fit: one tile of keys and of values, and in 16-bit dense attention one for each stage.

    This is a lower bound: in the other kernels the compiler decides how many stages hold tiles of keys.
    """
    itemsize = getattr(torch, key.dtype).itemsize
    stages = tile.num_stages if key.kernel == "flash" and itemsize == 2 else 1
    padded = max(16, 1 << (key.head_dim - 1).bit_length())
    needed = 2 * stages * tile.block_n * padded * itemsize
    if needed > (limit := SHARED_LIMIT[arch]):
        raise ValueError(f"needs at least {needed:,} bytes of shared memory a block, sm{arch} has {limit:,}")


def _is_whole(number: Any, least: int, most: int) -> bool:
    return type(number) is int and least <= number <= most
