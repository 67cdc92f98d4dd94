"""llama.cpp's own few bits, where the package llama-cpp-python is installed: files of them, and what they predict.

How fast they are, its server shows: ``bench.side_by_side.llama_cpp``.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import re
from collections.abc import Sequence as ReadOnlyList
from pathlib import Path

import torch
from torch import Tensor

from paged_infer.bench.quantisation.quality import HeldOut, Quality, measure
from paged_infer.model.loading.gguf_file import read_gguf

MODULE = "llama_cpp"
_TYPE = re.compile(r"(?:I?Q\d(?:_[A-Z0-9]+)*|MXFP4|BF16|F16|F32)$", re.IGNORECASE)
TYPES = {"Q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0", "Q4_K_M": "LLAMA_FTYPE_MOSTLY_Q4_K_M"}


def is_importable() -> bool:
    return importlib.util.find_spec(MODULE) is not None


def names_of(files: ReadOnlyList[Path]) -> list[str]:
    """Of GGUF files in tables: the type at the end of a file's name, such as Q4_K of smollm2-Q4_K.gguf, or all of it.

    Raises:
        ValueError: two have one name, so a table would have one row for both.
    """
    found = list[str]()
    for file in files:
        kind = _TYPE.search(file.stem)
        name = file.stem if kind is None else kind[0].upper()
        if name in found:
            raise ValueError(f"gguf: {files[found.index(name)]} and {file} are both {name}; rename one")
        found.append(name)
    return found


def requantise(source: Path, folder: Path) -> list[Path]:
    """Files of ``TYPES`` in ``folder``, from one of any type. Rows that no block of 256 divides get another type.

    Raises:
        ValueError: llama.cpp refuses; it has written why.
    """
    import llama_cpp

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # it has a line for each tensor
    found = []
    for name, kind in TYPES.items():
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize = getattr(llama_cpp, kind), True
        file = folder / f"{source.stem}.{name}.gguf"
        if llama_cpp.llama_model_quantize(str(source).encode(), str(file).encode(), ctypes.byref(params)):
            raise ValueError(f"llama.cpp does not make {name} of {source.name}")
        found.append(file)
    return found


def llama_quality(
    file: Path, name: str, texts: ReadOnlyList[HeldOut], reference: ReadOnlyList[Tensor], threads: int
) -> Quality:
    """Of a GGUF file, computed by llama.cpp; ``name``: its scheme in the table.

    Raises:
        ValueError: it does not load the file.
    """
    import llama_cpp

    longest = max(len(text.token_ids) for text in texts)
    try:
        llama = llama_cpp.Llama(str(file), n_ctx=longest, n_threads=threads, logits_all=True, verbose=False)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"llama.cpp does not load {file.name}: {error}") from None

    def predict(token_ids: ReadOnlyList[int]) -> Tensor:
        llama.reset()
        llama.eval(token_ids)
        return torch.from_numpy(llama.scores[: len(token_ids)].copy()).log_softmax(-1)

    with torch.inference_mode():
        found = measure(predict, texts, reference, scheme=name, method="llama.cpp", bits=file_bits(file))
    llama.close()
    return found


def file_bits(file: Path) -> float:
    """Of a weight of the layers' matrices, scales included."""
    matrices = [
        one for one in read_gguf(file).tensors.values() if one.name.startswith("blk.") and len(one.stored_shape) > 1
    ]
    num_weights = sum(torch.Size(one.stored_shape).numel() for one in matrices)
    return 8 * sum(torch.Size(one.stored_shape[:-1]).numel() * one.row_bytes for one in matrices) / num_weights
