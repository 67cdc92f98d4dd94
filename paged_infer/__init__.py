"""paged_infer: LLM inference, small enough to read and real enough to use.

The public names are imported when they are first used, so that ``import paged_infer`` costs nothing.
"""

import importlib as _importlib
import typing as _typing

if _typing.TYPE_CHECKING:
    from paged_infer.async_llm import AsyncLLM as AsyncLLM
    from paged_infer.engine.engine import LLMEngine as LLMEngine
    from paged_infer.llm import LLM as LLM
    from paged_infer.outputs import CompletionOutput as CompletionOutput
    from paged_infer.outputs import RequestOutput as RequestOutput
    from paged_infer.params import BeamSearchParams as BeamSearchParams
    from paged_infer.params import SamplingParams as SamplingParams
    from paged_infer.params import StructuredOutputsParams as StructuredOutputsParams

__version__ = "0.1.0"

_MODULES = {
    "LLM": "paged_infer.llm",
    "AsyncLLM": "paged_infer.async_llm",
    "LLMEngine": "paged_infer.engine.engine",
    "SamplingParams": "paged_infer.params",
    "BeamSearchParams": "paged_infer.params",
    "StructuredOutputsParams": "paged_infer.params",
    "RequestOutput": "paged_infer.outputs",
    "CompletionOutput": "paged_infer.outputs",
}
__all__ = [*_MODULES, "__version__"]


def __getattr__(name: str) -> _typing.Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(_importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)  # without the modules that have been imported meanwhile
