"""Pictures of what an engine did, from its trace: the timeline, the pool of blocks, and both with a slider.

The public names are imported when they are first used: ``import paged_infer.viz`` alone imports no matplotlib.
"""

import importlib as _importlib
import typing as _typing

if _typing.TYPE_CHECKING:
    from paged_infer.viz.explorer import explore as explore
    from paged_infer.viz.pool_map import pool_map_figure as pool_map_figure
    from paged_infer.viz.timeline import timeline_figure as timeline_figure

_MODULES = {"timeline_figure": "timeline", "pool_map_figure": "pool_map", "explore": "explorer"}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> _typing.Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(_importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
