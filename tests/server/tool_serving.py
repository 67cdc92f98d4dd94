"""A server with tools, and a way to choose what its model answers.

The storyteller was not trained to call tools. Here its chat template shows tools, and ``scripted`` gives each request a
grammar that allows one text alone. So its tokens come from the model one after the other, and go through sampler,
detokenizer and routes like any others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from serving import Served, serving

from paged_infer import SamplingParams, StructuredOutputsParams, storyteller
from paged_infer.server.service import Settings

TEMPLATE = r"""{%- for tool in tools or [] %}{{ 'T ' + (tool | tojson) + '\n' }}{% endfor %}
{%- for m in messages %}{{ '\n' + m.role + ': ' + m.content }}
{%- for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}
{%- endfor %}{{ '\nassistant:' }}{{ '<think>' if enable_thinking }}"""
OPTIONS = {"max_num_seqs": 8, "num_blocks": 256, "max_model_len": 1024}

ADD: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "a + b",
        "parameters": {
            "type": "object",
            "properties": {"a": {"$ref": "#/$defs/digit"}, "b": {"$ref": "#/$defs/digit"}},
            "required": ["a", "b"],
            "$defs": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}},
        },
    },
}
NOW: dict[str, Any] = {"type": "function", "function": {"name": "now"}}


def call_text(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


@contextlib.contextmanager
def tool_serving(folder: Path, **options: Any) -> Iterator[Served]:
    """A storyteller in ``folder`` with ``TEMPLATE``, and the parser of Hermes."""
    shutil.copytree(storyteller.PATH, folder, dirs_exist_ok=True)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    settings = Settings(tool_call_parser="hermes", served_model_names=("storyteller",))
    with serving(settings, model=folder, **{**OPTIONS, **options}) as served:
        yield served


@contextlib.contextmanager
def scripted(served: Served, *answers: str) -> Iterator[None]:
    """The next requests are answered by these texts."""
    script, submit = list(answers), served.engine.submit

    async def forced(prompt: Any, params: SamplingParams, *args: Any, **more: Any) -> Any:
        grammar = StructuredOutputsParams(choice=[script.pop(0)])
        return await submit(prompt, dataclasses.replace(params, structured_outputs=grammar), *args, **more)

    served.engine.submit = forced  # type: ignore[method-assign]
    try:
        yield
        assert not script, "not all answers were asked for"
    finally:
        del served.engine.submit  # type: ignore[method-assign]
