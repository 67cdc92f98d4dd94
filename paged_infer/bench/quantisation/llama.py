"""llama.cpp's quantised models, if the package llama-cpp-python is installed: writing them, and their quality.

Their speed is that of llama.cpp's server: ``bench.side_by_side.llama_cpp``.
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
    """Names of GGUF files for tables: the type at the end of the file's name (smollm2-Q4_K.gguf: Q4_K), or all of it.

    Raises:
        ValueError: two files get the same name.
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
    """Write a file of each of ``TYPES`` to ``folder``, from a GGUF file of any type.

    llama.cpp uses another type for matrices whose rows are not a multiple of the block size, 256.

    Raises:
        ValueError: llama.cpp failed; it has printed the reason.
    """
    import llama_cpp

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # it would log a line for each tensor
    found = []
    for name, kind in TYPES.items():
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize = getattr(llama_cpp, kind), True
        file = folder / f"{source.stem}.{name}.gguf"
        if llama_cpp.llama_model_quantize(str(source).encode(), str(file).encode(), ctypes.byref(params)):
            raise ValueError(f"llama.cpp cannot quantise {source.name} to {name}")
        found.append(file)
    return found


def llama_quality(
    file: Path, name: str, texts: ReadOnlyList[HeldOut], reference: ReadOnlyList[Tensor], threads: int
) -> Quality:
    """The quality of a GGUF file, computed by llama.cpp.

    Args:
        name: its scheme in the table.
        reference: log-probabilities [T, V] of the float model for each text.

    Raises:
        ValueError: llama.cpp cannot load the file.
    """
    import llama_cpp

    longest = max(len(text.token_ids) for text in texts)
    try:
        llama = llama_cpp.Llama(str(file), n_ctx=longest, n_threads=threads, logits_all=True, verbose=False)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"llama.cpp cannot load {file.name}: {error}") from None

    def predict(token_ids: ReadOnlyList[int]) -> Tensor:
        llama.reset()
        llama.eval(token_ids)
        return torch.from_numpy(llama.scores[: len(token_ids)].copy()).log_softmax(-1)

    with torch.inference_mode():
        found = measure(predict, texts, reference, scheme=name, method="llama.cpp", bits=file_bits(file))
    llama.close()
    return found


def file_bits(file: Path) -> float:
    """Bits per weight of the matrices of the layers, scales included."""
    matrices = [
        one for one in read_gguf(file).tensors.values() if one.name.startswith("blk.") and len(one.stored_shape) > 1
    ]
    num_weights = sum(torch.Size(one.stored_shape).numel() for one in matrices)
    return 8 * sum(torch.Size(one.stored_shape[:-1]).numel() * one.row_bytes for one in matrices) / num_weights
