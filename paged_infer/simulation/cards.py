"""GPUs as their data sheets describe them, and the links between them.

Rates are the sheets' dense ones (no sparsity), for 16-bit products accumulated in float32. The share of them that a
kernel reaches is up to the cost model. Sources, all NVIDIA's:

    a10       A10 data sheet (2021): 24 GB, 600 GB/s, 125 TFLOPS bfloat16
    a100      A100 data sheet (2021), SXM 80 GB: 2,039 GB/s, 312 TFLOPS, NVLink 600 GB/s
    h100      H100 data sheet (2022), SXM: 80 GB, 3.35 TB/s, 989 TFLOPS, NVLink 900 GB/s
    h200      H200 data sheet (2023), SXM: 141 GB, 4.8 TB/s, 989 TFLOPS, NVLink 900 GB/s
    l4        L4 data sheet (2023): 24 GB, 300 GB/s, 121 TFLOPS (242 with sparsity)
    rtx-4090  Ada architecture white paper (2022), appendix A: 24 GB, 1,008 GB/s, 165.2 TFLOPS
    rtx-pro-6000  RTX Blackwell PRO architecture white paper (2025): 96 GB, 1,792 GB/s, 503.8 TFLOPS

A CPU has no data sheet with the rates that a program reaches: ``Card("cpu", ...)`` is made from measured rates.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Link:
    """What an all-reduce between two cards reaches: bytes per second in one direction, and seconds to start one.

    The share of the sheet's rate (0.8 over NVLink, half over PCIe, where data pass through the host's memory) and the
    seconds are assumptions, not measurements.
    """

    name: str
    bytes_per_s: float
    latency_s: float


LINKS = {
    link.name: link
    for link in (
        Link("nvlink-4", 0.8 * 450e9, 10e-6),  # 900 GB/s in both directions together
        Link("nvlink-3", 0.8 * 300e9, 10e-6),
        Link("pcie-5", 0.5 * 64e9, 30e-6),
        Link("pcie-4", 0.5 * 32e9, 30e-6),
    )
}


@dataclass(frozen=True, slots=True)
class Card:
    """One device: memory in bytes, bandwidth in bytes per second, operations per second (a multiply-add is two).

    ``memory_bytes``: the sheet's GB taken as GiB, which is what they mean; a driver keeps 1 to 6 % of it.
    ``flops_per_s_8bit``: for products of 8-bit integers or floats; the 16-bit rate if the card has none faster.
    """

    name: str
    memory_bytes: float
    bytes_per_s: float
    flops_per_s: float
    flops_per_s_8bit: float
    link: Link = LINKS["pcie-4"]


def _card(name: str, gib: float, gb_per_s: float, tflops: float, tops: float, link: str) -> Card:
    return Card(name, gib * 2**30, gb_per_s * 1e9, tflops * 1e12, tops * 1e12, LINKS[link])


CARDS = {
    card.name: card
    for card in (
        _card("a10", 24, 600, 125, 250, "pcie-4"),
        _card("a100", 80, 2039, 312, 624, "nvlink-3"),
        _card("h100", 80, 3350, 989, 1979, "nvlink-4"),
        _card("h200", 141, 4800, 989, 1979, "nvlink-4"),
        _card("l4", 24, 300, 121, 242.5, "pcie-4"),
        _card("rtx-4090", 24, 1008, 165.2, 330.3, "pcie-4"),
        _card("rtx-pro-6000", 96, 1792, 503.8, 1007.6, "pcie-5"),
    )
}


def card_named(name: str) -> Card:
    """Raises ValueError for an unknown name; the message lists the known ones."""
    if name not in CARDS:
        raise ValueError(f"gpu {name!r}: not known; known: {', '.join(CARDS)}, or cpu, which is measured")
    return CARDS[name]
