"""Speculative decoding: guess the next tokens of a sequence, compute the guesses in one step, keep the right ones.

    known   ... t6 t7 | drafts  a  b  c            one step computes t7 a b c: four tokens instead of one
    sampled           |  a  b  x  .                after each of them the sequence's own sample, with its own noise
    kept                 a  b  x                   the drafts that equal the samples, and the sample after the last one

A draft is accepted if it is what the sequence samples at that position anyway. Noise is a function of (seed, sample,
position), so this is the token that would have been sampled without drafts: in float32, greedy and seeded texts do not
change by a token, however bad the drafts. In bfloat16 and float16, a step with drafts may round differently and so
decide a near tie the other way. (Leviathan et al. 2023, "Fast inference from transformers via speculative decoding",
preserve the distribution by accepting at random; here draft and target share their noise instead: a coupling.) Keys of
rejected drafts are in slots that the next tokens overwrite.

There are two sources of drafts:

- ``ngram``: what followed the last few tokens where they occurred before (Saxena 2023, "Prompt lookup decoding").
- ``draft_model``: a small model of the same vocabulary (``execution.draft_model``). Here only placeholders are planned.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from collections.abc import Sequence as ReadOnlyList
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

from paged_infer.control.sequence import PLACEHOLDER
from paged_infer.control.step import SamplingRow
from paged_infer.suggestions import suggests_names, unknown_names
from paged_infer.values import Checked

METHODS = ("ngram", "draft_model")


@suggests_names("speculative_config")
@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculativeConfig(Checked):
    """How to speculate. Names and meanings are vLLM's, and so are the defaults of the lookup.

    Args:
        method: one of ``METHODS``.
        num_speculative_tokens: the most tokens drafted for a sequence in a step.
        model: the draft model's folder, GGUF file or hub id; for ``draft_model`` only.
        prompt_lookup_max: for ``ngram``, the most last tokens to look up; the longest match is used.
        prompt_lookup_min: the fewest. If only one of the two is given it is both; by default they are 5.

    Raises:
        ValueError: a value is out of range, missing, or not used by the method; the message names it.
    """

    _prefix: ClassVar[str] = "speculative_config: "

    method: str
    num_speculative_tokens: int
    model: str | Path | None = None
    prompt_lookup_max: int | None = None
    prompt_lookup_min: int | None = None

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | SpeculativeConfig) -> SpeculativeConfig:
        """Raises ValueError unless it is a mapping of known keys without a required one missing."""
        if isinstance(options, SpeculativeConfig):
            return options
        if not isinstance(options, Mapping):
            raise ValueError(f"speculative_config={options!r}: must be a dict")
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in options if name not in known]:
            raise ValueError(unknown_names("speculative_config: unknown", unknown, known))
        if (method := options.get("method")) is not None and method not in METHODS:
            raise ValueError(f"speculative_config: method={method!r}: must be one of {', '.join(METHODS)}")
        missing = [name for name in ("method", "num_speculative_tokens") if options.get(name) is None]
        if missing:
            raise ValueError(f"speculative_config={dict(options)!r}: {' and '.join(missing)} missing")
        return cls(**options)

    def __post_init__(self) -> None:
        self._check_choice("method", METHODS)
        self._check_integer("num_speculative_tokens", 1)
        if self.method == "ngram":
            self._check_ngram()
            return
        if not isinstance(self.model, (str, Path)) or not str(self.model):
            raise self._refuse("model", "draft_model needs a folder, GGUF file or hub id")
        for name in ("prompt_lookup_max", "prompt_lookup_min"):
            if getattr(self, name) is not None:
                raise self._refuse(name, "used by ngram only")

    def _check_ngram(self) -> None:
        if self.model is not None:
            raise self._refuse("model", "ngram uses no draft model")
        low, high = self.prompt_lookup_min, self.prompt_lookup_max
        self._keep("prompt_lookup_min", low if low is not None else 5 if high is None else high)
        self._keep("prompt_lookup_max", high if high is not None else self.prompt_lookup_min)
        self._check_integer("prompt_lookup_min", 1)
        self._check_integer("prompt_lookup_max", 1)
        if self.prompt_lookup_min > self.prompt_lookup_max:  # type: ignore[operator]
            raise self._refuse("prompt_lookup_min", f"exceeds prompt_lookup_max={self.prompt_lookup_max}")


class Proposer(Protocol):
    """A source of drafts, called while a step is planned. Plain Python."""

    def propose(self, token_ids: ReadOnlyList[int], most: int) -> list[int]:
        """Up to ``most`` tokens that may follow ``token_ids``; ``PLACEHOLDER`` where a draft model fills them in."""


class NgramProposer:
    """Prompt lookup: find the longest run of last tokens earlier in the text, and draft what followed there."""

    def __init__(self, config: SpeculativeConfig) -> None:
        self._most = config.num_speculative_tokens
        self._longest, self._shortest = config.prompt_lookup_max or 0, config.prompt_lookup_min or 0

    def propose(self, token_ids: ReadOnlyList[int], most: int) -> list[int]:
        text = array("q", token_ids)
        memory, width = text.tobytes(), text.itemsize  # bytes.find searches in C
        for size in range(min(self._longest, len(text) - 1), self._shortest - 1, -1):
            suffix = memory[-size * width :]
            at = memory.find(suffix, 0, -width)  # at least one token has to follow the match
            while at % width and at >= 0:
                at = memory.find(suffix, at + 1, -width)
            if at >= 0:
                first = at // width + size
                return list(text[first : first + min(most, self._most)])
        return []


class DraftPlaceholders:
    """Placeholders for the tokens of a draft model, which runs once the step is planned."""

    def __init__(self, config: SpeculativeConfig) -> None:
        self._most = config.num_speculative_tokens

    def propose(self, token_ids: ReadOnlyList[int], most: int) -> list[int]:
        return [PLACEHOLDER] * min(most, self._most)


def make_proposer(config: SpeculativeConfig | None) -> Proposer | None:
    if config is None:
        return None
    return NgramProposer(config) if config.method == "ngram" else DraftPlaceholders(config)


def rows_after(row: SamplingRow, drafts: ReadOnlyList[int]) -> list[SamplingRow]:
    """How to sample after a sequence's last known token (``row``), and after each draft if it is accepted."""
    history = row.params.needs_history
    return [
        row,
        *(
            replace(
                row,
                position=row.position + n,
                num_output_tokens=row.num_output_tokens + n,
                output_token_ids=[*row.output_token_ids, *drafts[:n]] if history else (),
                mask=None if row.mask is None else row.mask.after(drafts[:n]),
            )
            for n in range(1, len(drafts) + 1)
        ),
    ]


def num_accepted(drafts: ReadOnlyList[int], sampled: ReadOnlyList[int]) -> int:
    """How many drafts, from the first on, equal what was sampled at their positions."""
    pairs = enumerate(zip(drafts, sampled, strict=False))
    return next((place for place, (draft, token) in pairs if draft != token), len(drafts))
