"""Tensor parallelism: what several ranks gain on links of several speeds."""

from __future__ import annotations

from collections.abc import Mapping

from paged_infer.viz.style import FAINT, INK, Picture, new_picture

from .charts import COLOURS, Values


def link_curves(
    micros: Values, gains: Mapping[str, Values], links: Mapping[str, tuple[float, float]], height: float = 3.6
) -> Picture:
    """How many times as fast two ranks are, over the time of a sum: a curve for each model, a band for each link.

    Args:
        micros: microseconds of a sum.
        links: the shortest and the longest time of a sum that was measured on each.
    """
    picture = new_picture(7, height)
    axes = picture.subplots()
    for (name, (low, high)), y, shade in zip(links.items(), (0.1, 0.3, 1.85), (0.9, 0.5, 0.9), strict=True):
        axes.axvspan(low / 1.04, high * 1.04, color=FAINT, alpha=shade, linewidth=0, zorder=0)
        axes.text((low * high) ** 0.5, y, name, ha="center", fontsize=8, color=INK)
    axes.axhline(1, color=INK, linewidth=0.8, linestyle=":", zorder=1)
    for (name, values), colour in zip(gains.items(), COLOURS, strict=False):
        axes.plot(micros, values, color=colour, label=name)
    axes.set(xscale="log", ylim=(0, 2.1), xlim=(micros[0], micros[-1]), xlabel="microseconds that one sum takes")
    axes.set_title("times as fast on two ranks: decoding, at best", fontsize=10)
    picture.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    return picture
