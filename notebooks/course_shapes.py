"""What chapter 17 needs beside what it builds: schemas, automata compared, engines, a storyteller with tools."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from course import open_llm

from paged_infer import LLM, SamplingParams, StructuredOutputsParams, storyteller
from paged_infer.control.guided.grammar import NativeGrammar
from paged_infer.control.guided.vocabulary import Vocabulary, allowed_ids
from paged_infer.storyteller.evaluation import quizzes

TEMPLATE = r"""{%- for tool in tools or [] %}{{ tool.function | tojson + '\n' }}{% endfor -%}
{%- for m in messages -%}
  {%- if m.role == 'user' %}{{ '\nQ: ' + m.content + '\nA:' }}
  {%- elif m.tool_calls %}{{ ' ' + (m.tool_calls[0].function | tojson) + '\n' }}
  {%- else %}{{ m.content }}{% endif -%}
  {%- if m.role == 'tool' and loop.last %}{{ '\nQ: ' + messages[1].content + '\nA:' }}{% endif -%}
{%- endfor -%}"""

# Options of engines that have to give the tokens of any other: the first has too few blocks for all that it is asked.
WAYS: dict[str, dict[str, Any]] = {
    "few blocks": {"block_size": 1, "num_blocks": 100, "max_model_len": 80},
    "prefix cache": {"block_size": 4, "enable_prefix_caching": True},
    "n-gram drafts": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 2}},
    "draft model": {
        "speculative_config": {
            "method": "draft_model",
            "num_speculative_tokens": 3,
            "model": str(storyteller.DRAFT_PATH),
        }
    },
    "two ranks": {"tensor_parallel_size": 2},
}


class Automaton(NamedTuple):
    """``step(state, bytes)`` gives the state after them or None, ``mask(state)`` the tokens that may come."""

    first: Any
    step: Callable[[Any, bytes], Any]
    mask: Callable[[Any], set[int]]


def native(kind: str, grammar: str, vocabulary: Vocabulary) -> Automaton:
    """The package's machine of a "regex", a "json" schema or a "choice"."""
    machine = NativeGrammar(kind, grammar, vocabulary).machine
    return Automaton(machine.start, machine.step, lambda state: {*allowed_ids(vocabulary.mask(machine, state))})


def num_equal(one: Automaton, other: Automaton) -> int:
    """Lead both through all their states, byte by byte, and assert equal masks; returns the number of pairs."""
    pairs = {(one.first, other.first): None}
    waiting = list(pairs)
    for a, b in waiting:
        assert one.mask(a) == other.mask(b)
        for byte in range(256):
            after = one.step(a, bytes([byte])), other.step(b, bytes([byte]))
            assert (after[0] is None) == (after[1] is None)
            if after[0] is not None and after not in pairs:
                pairs[after] = None
                waiting.append(after)
    return len(pairs)


def params(*, temperature: float = 0, **given: Any) -> SamplingParams:
    """Greedy by default, and of the shape ``json=``, ``regex=`` or ``choice=``, if one is given."""
    shape = {name: given.pop(name) for name in ("json", "regex", "choice") if name in given}
    structured = StructuredOutputsParams(**shape) if shape else None
    return SamplingParams(temperature=temperature, structured_outputs=structured, **given)


def object_of(**properties: Any) -> dict[str, Any]:
    """The schema of an object that has all of these properties and no other."""
    required = [*properties]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def where_questions(number: int) -> tuple[list[str], list[str]]:
    """Prompts of unseen stories that end with "Where is the ...?", and the true answers."""
    asked: list[tuple[str, str]] = []
    for seed in range(700_000, 700_000 + 4 * number):
        asked += [one for one in quizzes(storyteller.tell(seed=seed)) if "Where is the" in one[0].splitlines()[-2]]
    prompts, truths = zip(*asked[:number], strict=True)
    return list(prompts), list(truths)


class ToolCaller:
    """A storyteller with a chat template that shows tools, calls and results; it was never taught to call any."""

    def __init__(self, tools: list[dict[str, Any]], **options: Any) -> None:
        self.tools = tools
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(storyteller.PATH, folder, dirs_exist_ok=True)
            (Path(folder) / "chat_template.jinja").write_text(TEMPLATE)
            self.llm: LLM = open_llm(folder, **options)

    def prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        return self.llm.chat_prompt(messages, tools=self.tools)

    def stream(self, messages: list[dict[str, Any]], schema: dict[str, Any] | None = None) -> list[str]:
        """A greedy answer, as the pieces of text that come one after the other; of the schema, if there is one."""
        greedy = params(max_tokens=60, stop=["\n"], **({} if schema is None else {"json": schema}))
        texts = [output.outputs[0].text for output in self.llm.stream(self.prompt(messages), greedy)]
        return [after.removeprefix(before) for before, after in pairwise(["", *texts])]
