"""Separate reasoning, content and tool calls in a model's output, while its text grows.

    qwen3         <think> reasoning </think> content        or content alone
    deepseek_r1           reasoning </think> content        with or without <think> before it

The chat template may have put ``<think>`` into the prompt, or ``<think></think>`` where reasoning is turned off. So the
part in which an output begins depends on its prompt. ``control.reasoning`` does the same with tokens, in the engine.
"""

from __future__ import annotations

from paged_infer.control.reasoning import Part
from paged_infer.text.tool_parsers import Delta, ToolParser, num_held

START, END = "<think>", "</think>"
OPENING, REASONING, CONTENT = (part.value for part in Part)  # the part in which an output begins


class ReasoningParser:
    """Splits one answer at ``</think>``.

    Args:
        first: the part in which the answer begins: "opening", where reasoning needs ``<think>``; "reasoning", with or
            without ``<think>``; or "content", without reasoning.
    """

    def __init__(self, first: str) -> None:
        self._place = first
        self._may_open = first != CONTENT  # whether the text so far can be the beginning of <think>
        self._text = ""  # not processed yet

    @property
    def has_ended(self) -> bool:
        """Whether content comes now: its reasoning has ended, or it has none."""
        return self._place == CONTENT

    def feed(self, text: str) -> Delta:
        """What is certain after ``text``, the next piece of the output."""
        return self._split(self._text + text, is_last=False)

    def finish(self, text: str = "") -> Delta:
        """The rest, at the end of the output, after its last piece. Without ``</think>``, all of it is reasoning."""
        return self._split(self._text + text, is_last=True)

    def _split(self, text: str, is_last: bool) -> Delta:
        self._text = ""
        if self._may_open:
            if not is_last and START.startswith(text) and text != START:
                self._text = text
                return Delta()
            self._may_open = False
            if text.startswith(START):
                self._place, text = REASONING, text[len(START) :]
            elif self._place == OPENING:
                self._place = CONTENT
        if self._place == CONTENT:
            return Delta(content=text)
        reasoning, end, content = text.partition(END)
        if end:
            self._place = CONTENT
            return Delta(content, reasoning=reasoning)
        num_kept = 0 if is_last else num_held(text, END)
        self._text = text[len(text) - num_kept :]
        return Delta(reasoning=text[: len(text) - num_kept])


class AnswerParser:
    """Splits one answer into reasoning, content and tool calls, which it looks for in the content only.

    Args:
        reasoning: None if answers have no reasoning.
        tools: None if there are no tool calls to look for.
        max_calls: calls after this many are dropped.
    """

    def __init__(
        self, reasoning: ReasoningParser | None, tools: ToolParser | None, max_calls: int | None = None
    ) -> None:
        self._reasoning, self._tools, self._max_calls = reasoning, tools, max_calls

    @property
    def has_calls(self) -> bool:
        return self._tools is not None and self._tools.num_calls > 0

    def feed(self, text: str) -> Delta:
        """What is certain after ``text``, the next piece of the output."""
        found = Delta(text) if self._reasoning is None else self._reasoning.feed(text)
        return found if self._tools is None else self._joined(found.reasoning, self._tools.feed(found.content))

    def finish(self, text: str = "") -> Delta:
        """The rest, at the end of the output, after its last piece."""
        found = Delta(text) if self._reasoning is None else self._reasoning.finish(text)
        return found if self._tools is None else self._joined(found.reasoning, self._tools.finish(found.content))

    def _joined(self, reasoning: str, found: Delta) -> Delta:
        most = self._max_calls
        calls = tuple(call for call in found.tool_calls if most is None or call.index < most)
        return Delta(found.content, calls, reasoning)
