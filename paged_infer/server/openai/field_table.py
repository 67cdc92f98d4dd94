"""The table of request fields in this folder's README.md.

$ python -m paged_infer.server.openai.field_table    # rewrites it
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic.fields import FieldInfo

from paged_infer.server.openai.fields import ACCEPTED
from paged_infer.server.openai.protocol import ChatCompletionRequest, CompletionRequest, SamplingFields, StreamOptions

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- fields: python -m paged_infer.server.openai.field_table -->\n", "<!-- end of fields -->\n"
_MODELS = (CompletionRequest, ChatCompletionRequest)


def known_fields() -> list[str]:
    """All fields that one of the two OpenAI routes serves, accepts or refuses by name."""
    names = {name for model in _MODELS for name in (*model.model_fields, *model.refused_by_name)}
    return sorted({*names, *(f"stream_options.{name}" for name in StreamOptions.model_fields)})


def table() -> str:
    """The table in Markdown."""
    lines = ["| field | completions | chat | |", "|---|---|---|---|"]
    for name in known_fields():
        states, notes = zip(*(_state(model, name) for model in _MODELS), strict=True)
        noted = list(dict.fromkeys(filter(None, notes)))
        if len(noted) > 1:
            noted = [f"{where}: {note}" for where, note in zip(("completions", "chat"), notes, strict=True) if note]
        lines.append(f"| `{name}` | {states[0]} | {states[1]} | {'; '.join(noted)} |")
    return "\n".join(lines) + "\n"


def _state(model: type[SamplingFields], name: str) -> tuple[str, str]:
    """Whether a route serves, accepts or refuses a field, with the note in the table."""
    if name.startswith("stream_options."):
        return "served", _described(StreamOptions.model_fields[name.partition(".")[2]])
    if name in model.model_fields:
        why = ACCEPTED.get(name)
        return ("served", _described(model.model_fields[name])) if why is None else ("accepted", why)
    refused = model.refused_by_name.get(name)
    if refused is None:
        return "unknown", ""
    harmless = ", ".join(f"`{json.dumps(value)}`" for value in refused.harmless)
    return "refused", refused.why + (f" (accepted: {harmless})" if harmless else "")


def _described(field: FieldInfo) -> str:
    extra = field.json_schema_extra
    return field.description or str(extra.get("description", "") if isinstance(extra, dict) else "")


def main() -> None:
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    README.write_text(before + BEGIN + table() + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
