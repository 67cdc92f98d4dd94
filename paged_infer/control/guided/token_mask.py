"""The tokens that a grammar allows for one sample: plain data once computed."""

from __future__ import annotations

from collections.abc import Sequence as ReadOnlyList

from paged_infer.control.guided.grammar import Matcher, mask_after


class TokenMask:
    """A mask that is computed when the sampler asks for it: on a GPU, after the model has been launched.

    A step's masks are computed before its tokens are known, so the matcher has not moved since the step was planned.
    Pickling computes it first. Use ``fixed`` before that if masks after drafts are needed in the other process.

    Args:
        matcher: the sequence's.
        drafts: tokens that come before this sample, and may yet be rejected.
    """

    __slots__ = ("_bits", "_drafts", "_following", "_is_known", "_matcher", "error")

    def __init__(self, matcher: Matcher | None, drafts: ReadOnlyList[int] = ()) -> None:
        self._matcher, self._drafts = matcher, drafts
        self._bits: bytes | None = None
        self._is_known = False
        self._following: list[TokenMask] = []  # without a matcher: after one draft, after two, ...
        self.error: str | None = None  # why the grammar allows nothing, if ``bits`` are b""

    @property
    def bits(self) -> bytes | None:
        """One bit for each token, see ``control.guided.vocabulary``. None: all are allowed; b"": the grammar failed."""
        if not self._is_known and self._matcher is not None:
            self._is_known = True
            try:
                self._bits = mask_after(self._matcher, self._drafts)
            except Exception as error:  # a library can raise anything, and only this request may fail
                self._bits, self.error = b"", str(error) or type(error).__name__
        return self._bits

    def after(self, drafts: ReadOnlyList[int]) -> TokenMask:
        """The mask after these further drafts."""
        if self._matcher is None:
            return self._following[len(drafts) - 1]
        return TokenMask(self._matcher, [*self._drafts, *drafts])

    def fixed(self, drafts: ReadOnlyList[int]) -> TokenMask:
        """The same without the matcher, to be sent to another process, with the masks after each of ``drafts``."""
        found = TokenMask(None)
        found._bits, found.error = self.bits, self.error
        found._following = [self.after(drafts[:n]).fixed(()) for n in range(1, len(drafts) + 1)]
        return found

    def __getstate__(self) -> tuple[bytes | None, str | None, list[TokenMask]]:
        return self.bits, self.error, self._following

    def __setstate__(self, state: tuple[bytes | None, str | None, list[TokenMask]]) -> None:
        self._matcher, self._drafts, self._is_known = None, (), True
        self._bits, self.error, self._following = state

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TokenMask) and (self.bits, self.error) == (other.bits, other.error)

    __hash__ = None  # type: ignore[assignment]
