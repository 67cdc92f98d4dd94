"""``paged-infer quantize``: read a float checkpoint, write a quantised folder."""

from __future__ import annotations

import logging
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from paged_infer import storyteller
from paged_infer.kernels.quant.weight import QuantisedWeight
from paged_infer.model.linear import DENSE
from paged_infer.model.loading.checkpoint import config_dict, read_config
from paged_infer.model.loading.hub import BUNDLED, resolve_model
from paged_infer.model.loading.load import load_decoder
from paged_infer.model.loading.save_quantised import check_can_save, save_quantised
from paged_infer.model.quant.post_training import check_method, quantise_decoder
from paged_infer.model.quant.scheme import Scheme
from paged_infer.model.quant.sensitivity import narrowable, sensitivities, stay_wide
from paged_infer.storyteller.evaluation import document
from paged_infer.storyteller.stories.grammar import FIRST_EVALUATION_SEED
from paged_infer.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

SCHEMES = ("w4a16", "w8a16", "w8a8")
NUM_TEXTS, TEXT_TOKENS = 24, 512  # calibration texts, and the tokens of one that is cut from a file
NUM_SENSITIVITY_TEXTS = 4  # the first calibration texts, which the model reads once for each linear layer
FIRST_STORY = 50_000_000  # seed of the first calibration story
LAST_SEED = (FIRST_EVALUATION_SEED - FIRST_STORY) // NUM_TEXTS - 1  # larger ones would reach the evaluation's stories


@dataclass(frozen=True, slots=True)
class Report:
    """What was quantised.

    Attributes:
        num_parameters: all parameters of the model.
        num_quantised: those in quantised matrices.
        quantised_bytes: bytes of the quantised matrices, scales and zero points included.
        is_tied: the head is tied to the embedding.
        wide: names of the linear layers that ``keep_wide`` left unquantised.
    """

    num_parameters: int
    num_quantised: int
    quantised_bytes: int
    is_tied: bool
    wide: tuple[str, ...] = ()


def quantize(
    model: str,
    out: Path,
    *,
    scheme: str = "w4a16",
    method: str = "rtn",
    group_size: int | None = None,
    calibration: str | None = None,
    keep_wide: float = 0.0,
    seed: int = 0,
    on_start: Callable[[int], None] = lambda num_layers: None,
    on_layer: Callable[[], None] = lambda: None,
) -> Report:
    """Quantise a model's linear layers and write it to ``out``, in compressed-tensors' format, with its tokenizer.

    Embedding, head and routers are not quantised; experts are quantised one by one. The model is held once, in float32.
    The same seed and number of threads give the same bytes; "rtn" depends on neither.

    transformers 5.23 dequantises the experts of a mixture as it loads them; with "w8a8" it refuses to load them.

    Args:
        model: a folder, GGUF file, hub id or the name of a bundled model ("storyteller").
        out: a folder that does not exist, or is empty; it appears when it is complete.
        scheme: "w4a16": int4 in groups. "w8a16": int8 per row, or in groups. "w8a8": int8 per row, and activations are
            quantised to int8 per token when the model runs.
        method: one of ``post_training.METHODS``.
        group_size: columns that share a scale. None: 32 for "w4a16", a row for the others.
        calibration: "stories" (the storyteller's) or the path of a text file. None: stories, for the storyteller only.
        keep_wide: the share of the linear layers' weights, 0 .. 1, that may stay unquantised: of the layers whose
            rounding alone changes the predictions most, on the first texts (``model.quant.sensitivity``).
        seed: chooses the calibration texts.
        on_start: called with the number of decoder layers plus, with ``keep_wide``, of linear layers to measure.
        on_layer: called after each of these.

    Raises:
        ValueError: an option out of range, a model that cannot be quantised, or a calibration file without text.
        OSError: the folder that is to hold ``out`` cannot be written to.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme={scheme!r}: must be one of {', '.join(SCHEMES)}")
    if not 0 <= keep_wide < 1:
        raise ValueError(f"keep_wide={keep_wide}: must be >= 0 and < 1")
    reads = method != "rtn" or keep_wide > 0
    if not reads and calibration is not None:
        raise ValueError(f"calibration={calibration!r}: method 'rtn' uses no text")
    if scheme == "w8a8" and group_size is not None:
        raise ValueError(f"group_size={group_size}: 'w8a8' takes none: one scale per row keeps its products integer")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: exists already and is not an empty folder")
    out = Path(os.path.realpath(out))  # "." has no name; of a symbolic link, the target is created or replaced
    if os.path.ismount(out):
        raise ValueError(f"{out}: is a mount point, which cannot be replaced: name a folder in it")
    grid = _scheme(scheme, group_size)
    path = resolve_model(model)
    config = read_config(path)
    check_can_save(config)
    check_method(config, method)
    if scheme == "w8a8" and config.moe is not None:
        logger.warning("experts in w8a8: transformers 5.23 does not load such a folder, this engine does")
    texts = calibration_texts(path, calibration, seed) if reads else []
    out.parent.mkdir(parents=True, exist_ok=True)
    _draft_folder(out).cleanup()  # if it cannot be created, fail before the work
    decoder = load_decoder(path, torch.float32, method_of=lambda name: DENSE)
    wide = list[str]()
    on_start(len(decoder.layers) + (len(narrowable(decoder)) if keep_wide else 0))
    if keep_wide:
        measured = sensitivities(decoder, grid, texts[:NUM_SENSITIVITY_TEXTS], on_layer)
        wide = stay_wide(decoder, measured, keep_wide)
        if any(".experts." in name for name in wide):
            logger.warning("some experts stay floats: this engine loads such a folder, transformers 5.23 does not")
    found = quantise_decoder(decoder, grid, method, texts, wide=wide, on_layer=on_layer)
    with _draft_folder(out) as name:
        draft = Path(name) / out.name
        draft.mkdir()
        _copy_the_rest(path, draft)  # config.json is written last: a folder without it is no checkpoint
        save_quantised(draft, config_dict(path), decoder, found, grid, rounds_inputs=scheme == "w8a8")
        draft.replace(out)
    return _report(decoder.config.num_parameters, found, decoder.config.tie_word_embeddings, wide)


def _draft_folder(out: Path) -> tempfile.TemporaryDirectory[str]:
    """A temporary folder next to ``out``. Its name tells what wrote it, should a killed process leave it behind."""
    return tempfile.TemporaryDirectory(prefix="quantize-", dir=out.parent)


def _scheme(name: str, group_size: int | None) -> Scheme:
    bits = 4 if name == "w4a16" else 8
    size = 32 if group_size is None and bits == 4 else group_size
    return Scheme(bits) if size is None else Scheme(bits, True, "group", size)


def calibration_texts(path: Path, calibration: str | None, seed: int, option: str = "calibration") -> list[list[int]]:
    """Token ids of ``NUM_TEXTS`` stories, or of up to as many pieces of ``TEXT_TOKENS`` tokens of a file.

    Args:
        path: the model, whose tokenizer is used.
        calibration: "stories", a text file, or None: stories, for a bundled model only.
        seed: chooses the stories or pieces.
        option: what the caller calls ``calibration``, for error messages.

    Raises:
        ValueError: the model has no tokenizer, the file has no text, or the seed is out of range.
    """
    if calibration is None and path not in BUNDLED.values():
        raise ValueError("calibration=None: this model needs a text file like the text that it will read, or 'stories'")
    tokenizer = Tokenizer.from_pretrained(path)
    if tokenizer is None:
        raise ValueError(f"{path}: has no tokenizer, so it cannot read {option} texts")
    if calibration in (None, "stories"):
        if not 0 <= seed <= LAST_SEED:
            raise ValueError(f"seed={seed}: must be 0 to {LAST_SEED}")
        first = FIRST_STORY + seed * NUM_TEXTS
        return [tokenizer.encode(document(storyteller.tell(first + i))) for i in range(NUM_TEXTS)]
    try:
        text = Path(str(calibration)).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{option}={calibration!r}: cannot be read as text ({error})") from None
    if not text.strip():
        raise ValueError(f"{option}={calibration!r}: has no text")
    ids = tokenizer.encode(text)
    pieces = [ids[start : start + TEXT_TOKENS] for start in range(0, len(ids), TEXT_TOKENS)]
    return random.Random(seed).sample(pieces, min(NUM_TEXTS, len(pieces)))


_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot")  # suffixes of weights


def _copy_the_rest(path: Path, folder: Path) -> None:
    """Copy the files that are neither weights nor config.json: tokenizer, chat template, generation config."""
    if path.is_file():
        tokenizer = Tokenizer.from_pretrained(path)
        if tokenizer is not None:
            tokenizer.save(folder)
        return
    for file in sorted(path.iterdir()):
        is_weights = file.suffix in _WEIGHTS or file.name.endswith(".index.json")
        if file.is_file() and not is_weights and file.name != "config.json":
            shutil.copy(file, folder)


def _report(num_parameters: int, found: dict[str, QuantisedWeight], is_tied: bool, wide: list[str]) -> Report:
    sizes = [weight.shape[0] * weight.shape[1] for weight in found.values()]
    num_bytes = sum(weight.num_bytes for weight in found.values())
    return Report(num_parameters, sum(sizes), num_bytes, is_tied, tuple(wide))
