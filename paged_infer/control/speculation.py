"""Speculation: guess what a sequence will say, compute the guesses in one step, keep those that it says itself.

    known   ... t6 t7 | drafts  a  b  c            one step computes t7 a b c: four tokens in place of one
    drawn             |  a  b  x  .                after each of them the sequence's own draw, by its own noise
    kept                 a  b  x                   the drafts that equal the draws, and the draw after the last of them

A draft is accepted if it is what the sequence draws at that place anyway. Noise is a function of (seed, sample,
position), so this draw is the one that would have been made without drafts: in float32, greedy and seeded texts do not
change by a token, however bad the drafts; in bfloat16 and float16, a step with drafts may round differently and so
decide a near tie the other way. (Leviathan et al. 2023, "Fast inference from transformers via speculative decoding",
preserve the distribution by accepting at random; here draft and target share their noise instead: a coupling.) Keys of
rejected drafts lie in slots that the next tokens overwrite.

Drafts come from one of two:

- ``ngram``: what followed the last few tokens where they stood before (Saxena 2023, "Prompt lookup decoding").
- ``draft_model``: a small model of the same vocabulary (``execution.draft_model``). Here its places are planned.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from collections.abc import Sequence as ReadOnlyList
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

from paged_infer.control.request import PLACEHOLDER
from paged_infer.control.step import SamplingRow
from paged_infer.values import Checked

METHODS = ("ngram", "draft_model")


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculativeConfig(Checked):
    """How to speculate. Names and meanings are vLLM's, and so are the defaults of the lookup.

    Args:
        method: one of ``METHODS``.
        num_speculative_tokens: the most tokens drafted for a sequence in a step.
        model: the draft model's folder or hub id, in Hugging Face format.
        prompt_lookup_max: with ``ngram``, the most last tokens to look for; the longest that is found is followed.
        prompt_lookup_min: the fewest. One of the two alone is both; without either they are 5.

    Raises:
        ValueError: a value out of its range, missing, or of no use to the method; the message names it.
    """

    _prefix: ClassVar[str] = "speculative_config: "

    method: str
    num_speculative_tokens: int
    model: str | Path | None = None
    prompt_lookup_max: int | None = None
    prompt_lookup_min: int | None = None

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | SpeculativeConfig) -> SpeculativeConfig:
        """Raises ValueError for what is no mapping, and for unknown or missing keys; the message lists the known."""
        if isinstance(options, SpeculativeConfig):
            return options
        if not isinstance(options, Mapping):
            raise ValueError(f"speculative_config={options!r}: must be a dict")
        known = [field.name for field in fields(cls)]
        unknown = [str(name) for name in options if name not in known]
        if unknown:
            raise ValueError(f"speculative_config: unknown {', '.join(unknown)}; known: {', '.join(known)}")
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
            raise self._refuse("model", "draft_model needs a folder or hub id")
        for name in ("prompt_lookup_max", "prompt_lookup_min"):
            if getattr(self, name) is not None:
                raise self._refuse(name, "only ngram looks anything up")

    def _check_ngram(self) -> None:
        if self.model is not None:
            raise self._refuse("model", "ngram has no draft model")
        low, high = self.prompt_lookup_min, self.prompt_lookup_max
        self._keep("prompt_lookup_min", low if low is not None else 5 if high is None else high)
        self._keep("prompt_lookup_max", high if high is not None else self.prompt_lookup_min)
        self._check_integer("prompt_lookup_min", 1)
        self._check_integer("prompt_lookup_max", 1)
        if self.prompt_lookup_min > self.prompt_lookup_max:  # type: ignore[operator]
            raise self._refuse("prompt_lookup_min", f"exceeds prompt_lookup_max={self.prompt_lookup_max}")


class Proposer(Protocol):
    """Who drafts. Plain Python, asked while a step is planned."""

    def propose(self, token_ids: ReadOnlyList[int], most: int) -> list[int]:
        """Up to ``most`` tokens that may follow ``token_ids``; ``PLACEHOLDER`` where a draft model fills them in."""


class NgramProposer:
    """Prompt lookup: the last tokens, as many as stand somewhere before, and what followed them there first."""

    def __init__(self, config: SpeculativeConfig) -> None:
        self._most = config.num_speculative_tokens
        self._longest, self._shortest = config.prompt_lookup_max or 0, config.prompt_lookup_min or 0

    def propose(self, token_ids: ReadOnlyList[int], most: int) -> list[int]:
        text = array("q", token_ids)
        memory, width = text.tobytes(), text.itemsize  # so that the search is that of bytes, in C
        for size in range(min(self._longest, len(text) - 1), self._shortest - 1, -1):
            ending = memory[-size * width :]
            at = memory.find(ending, 0, -width)  # at least one token has to follow
            while at % width and at >= 0:
                at = memory.find(ending, at + 1, -width)
            if at >= 0:
                first = at // width + size
                return list(text[first : first + min(most, self._most)])
        return []


class DraftPlaces:
    """Places for the tokens of a draft model, which speaks once the step is planned."""

    def __init__(self, config: SpeculativeConfig) -> None:
        self._most = config.num_speculative_tokens

    def propose(self, token_ids: ReadOnlyList[int], most: int) -> list[int]:
        return [PLACEHOLDER] * min(most, self._most)


def make_proposer(config: SpeculativeConfig | None) -> Proposer | None:
    if config is None:
        return None
    return NgramProposer(config) if config.method == "ngram" else DraftPlaces(config)


def rows_after(row: SamplingRow, drafts: ReadOnlyList[int]) -> list[SamplingRow]:
    """How to draw after a sequence's last token, which is ``row``, and after each draft, as if it had been said."""
    history = row.params.has_penalties
    return [
        row,
        *(
            replace(
                row,
                position=row.position + n,
                num_output_tokens=row.num_output_tokens + n,
                output_token_ids=[*row.output_token_ids, *drafts[:n]] if history else (),
            )
            for n in range(1, len(drafts) + 1)
        ),
    ]


def num_accepted(drafts: ReadOnlyList[int], draws: ReadOnlyList[int]) -> int:
    """How many of the drafts, from the first, are what was drawn in their places."""
    pairs = enumerate(zip(drafts, draws, strict=False))
    return next((place for place, (draft, draw) in pairs if draft != draw), len(drafts))
