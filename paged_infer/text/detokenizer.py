"""The text of a growing sequence, piece by piece: what is returned never changes."""

from __future__ import annotations

import codecs
import unicodedata
from collections.abc import Sequence

import regex

from paged_infer.text.continuation import CONTEXT, num_shared, num_unfinished, prompt_context
from paged_infer.text.tokenizer import REPLACEMENT, Tokenizer


class StreamingDecoder:
    """Turns the growing ids of one sequence into text that, once returned, never changes.

    The pieces of all ``push`` calls and of ``finish`` join to exactly ``tokenizer.decode(all ids)``, or, after
    ``prompt_token_ids``, to ``continuation(tokenizer, prompt, all ids)``. It holds back:

    - a trailing U+FFFD, which may be the first bytes of a character that a later token completes;
    - with byte-fallback tokens (``<0xNN>``), the whole open run of them, since the decoder turns a run that is not
      UTF-8 into one U+FFFD per byte: only a token of another kind, or an invalid byte, settles the run;
    - the last grapheme cluster (Unicode annex 29) while its last character may still grow into a larger one: symbols
      and emoji (So, Sk, extended pictographs, regional indicators), format characters such as ZWJ (Cf), marks (Mn,
      Mc, Me), conjoining jamo, and letters without case that are not wide (Thai, Devanagari, Arabic, ...). It is
      returned with the text that closes it, or once it is longer than 32 code points.

    Everything else (ASCII, Latin, Cyrillic, Greek, digits, CJK, kana, Hangul syllables) is returned immediately, so
    most text streams without delay. One case remains: a mark that comes in a later token than such a base
    (``e`` + U+0301, the keycap ``1`` + U+FE0F + U+20E3) begins a separate piece.

    Like vLLM's incremental detokenizer, it decodes a short window of the newest ids; a token costs O(1), amortised:

        window_ids   [ t t t t t t t ]   ->   text   [ returned: context | held ]
    """

    WINDOW = 8  # tokens that a window grows by before it is cut
    MAX_CLUSTER = 32  # code points; Unicode's stream-safe format allows 30 marks

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._byte_of = tokenizer.byte_tokens
        self._window_ids: list[int] = []
        self._num_out = 0  # characters of the window's text that have been returned
        self._cut_at = self.WINDOW
        self._run_length = 0  # byte tokens at the end of the window that no other token has closed
        self._run_utf8 = codecs.getincrementaldecoder("utf-8")()
        self._run_is_valid = True
        self._push(context := prompt_context(tokenizer, prompt_token_ids))
        held = tokenizer.decode(self._window_ids)[self._num_out :]
        # Text of the prompt that is still held back: it will precede the text of the output and must be removed.
        self._of_prompt = held[: len(held) - num_unfinished(tokenizer, context, held)]

    def push(self, token_ids: Sequence[int]) -> str:
        """Add ids; return the text that they settle, often "" or a few characters."""
        return self._after_prompt(self._push(token_ids))

    def finish(self) -> str:
        """The text that was held back, once no more ids will come."""
        return self._after_prompt(self._give_out(self._tokenizer.decode(self._window_ids)))

    def _after_prompt(self, piece: str) -> str:
        if not self._of_prompt:
            return piece
        num_same = num_shared(self._of_prompt, piece)
        self._of_prompt = self._of_prompt[num_same:] if num_same == len(piece) else ""
        return piece[num_same:]

    def _push(self, token_ids: Sequence[int]) -> str:
        pieces: list[str] = []
        stale = False  # ids were added since the window was decoded
        for token_id in token_ids:
            if self._tokenizer.is_silent(token_id):
                continue
            byte = self._byte_of.get(token_id)
            if byte is None:
                self._close_run()
                self._window_ids.append(token_id)
                stale = True
                continue
            if stale:
                pieces.append(self._emit())
                stale = False
            pieces.append(self._push_byte(token_id, byte))
        if stale:
            pieces.append(self._emit())
        return "".join(pieces)

    def _push_byte(self, token_id: int, byte: int) -> str:
        self._run_length += 1
        if not self._run_is_valid and self._run_length > 2:
            return REPLACEMENT  # the window's held U+FFFD is returned, and this byte's is held instead
        self._window_ids.append(token_id)
        try:
            self._run_utf8.decode(bytes([byte]))
        except UnicodeDecodeError:
            self._run_is_valid = False
        if self._run_is_valid or self._run_length < 2:
            return ""
        # The run cannot become valid: all of it is U+FFFD, and so is every byte that extends it. From here
        # a window of two invalid bytes, the first returned and the second held, represents the run.
        piece = self._give_out(self._tokenizer.decode(self._window_ids)[:-1])
        invalid_id = next(i for i, b in self._byte_of.items() if b == 0xFF)
        self._window_ids, self._num_out, self._cut_at = [invalid_id, invalid_id], 1, self.WINDOW
        return piece

    def _close_run(self) -> None:
        if self._run_length:
            self._run_length, self._run_is_valid = 0, True
            self._run_utf8.reset()

    def _emit(self) -> str:
        text = self._tokenizer.decode(self._window_ids)
        num_new = num_settled(text[self._num_out :], self.MAX_CLUSTER)
        piece = self._give_out(text[: self._num_out + num_new])
        if len(self._window_ids) > self._cut_at:
            self._cut_window(text)
        return piece

    def _give_out(self, settled: str) -> str:
        piece = settled[self._num_out :]
        self._num_out = len(settled)
        return piece

    def _cut_window(self, text: str) -> None:
        """Drop ids from the front of the window if their text has been returned.

        The shorter window may begin inside a character, and its decoder sees a start of text, which can cost a space.
        Both show in its first characters only: at most three bytes of a begun character, each one U+FFFD, then the
        decoder agrees with the whole again. So a cut is safe when that many characters after it have been returned.
        """
        num_held = len(text) - self._num_out
        num_kept = 2
        while num_kept < len(self._window_ids):
            shorter = self._tokenizer.decode(self._window_ids[-num_kept:])
            if len(shorter) - num_held >= CONTEXT and text.endswith(shorter[CONTEXT:]):
                self._window_ids = self._window_ids[-num_kept:]
                self._num_out = len(shorter) - num_held
                break
            num_kept *= 2
        self._cut_at = len(self._window_ids) + self.WINDOW


def num_settled(text: str, max_cluster: int = StreamingDecoder.MAX_CLUSTER) -> int:
    """How many characters of ``text`` no later text can change or join: see StreamingDecoder."""
    end = len(text) - 1 if text.endswith(REPLACEMENT) else len(text)
    if not end or not _may_grow(text[end - 1]):
        return end
    *_, last = regex.finditer(r"\X", text, endpos=end)
    return last.start() if end - last.start() <= max_cluster else end


def _may_grow(char: str) -> bool:
    if char.isascii():
        return False
    category = unicodedata.category(char)
    if category == "Lo":
        is_conjoining = "\u1100" <= char <= "\u11ff" or "\ua960" <= char <= "\ua97f"
        return is_conjoining or unicodedata.east_asian_width(char) not in ("W", "F")
    growing = category in ("So", "Sk", "Cf", "Mn", "Mc", "Me")
    return growing or regex.match(r"\p{Extended_Pictographic}", char) is not None
