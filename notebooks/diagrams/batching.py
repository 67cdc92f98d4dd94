"""Requests in time: the states of one, and two ways to batch many."""

from __future__ import annotations

from .drawing import Drawing


def request_life() -> Drawing:
    d = Drawing(
        860,
        470,
        "The states of a sequence",
        "A new sequence waits. It is admitted and runs. Preempted, it waits again and is recomputed, or its blocks are "
        "swapped out and it is resumed later. It finishes by a stop, its length or an error; an abort ends it in any "
        "state.",
    )
    d.box(30, 200, 150, 56, "`WAITING`", "_holds no blocks_", tone="grey")
    running = d.box(370, 200, 150, 56, "`RUNNING`", "_blocks in the pool_", tone="blue")
    finished = d.box(690, 200, 150, 56, "`FINISHED`", "_blocks are freed_", tone="green")
    swapped = d.box(370, 380, 150, 56, "`SWAPPED`", "_in swap space_", tone="violet")

    d.arrow((70, 150), (70, 200))
    d.label(30, 140, "`Scheduler.add`")
    d.arrow((180, 216), (370, 216), tone="blue")
    d.label(275, 190, "admitted", "middle")
    d.label(275, 208, "`admit_waiting`", "middle")
    d.arrow((370, 240), (180, 240), tone="red")
    d.label(275, 260, "preempted: blocks freed,", "middle")
    d.label(275, 277, "all tokens recomputed", "middle")

    d.arrow((410, 200), (410, 160), (480, 160), (480, 200), tone="blue")
    d.label(445, 132, "computes tokens in each step", "middle")
    d.label(445, 150, "`schedule_running, settle`", "middle")

    d.arrow((410, 256), (410, 380), tone="red")
    d.label(400, 316, "preempted: blocks", "end")
    d.label(400, 333, "swapped out", "end")
    d.arrow((480, 380), (480, 256), tone="blue")
    d.label(490, 316, "resumed")
    d.label(490, 333, "`resume_swapped`")

    d.arrow(running.right, finished.left, tone="green")
    d.label(605, 202, "stop, length", "middle")
    d.label(605, 219, "or error", "middle")

    d.arrow(swapped.left, (105, 408), (105, 256), dashed=True)
    d.label(120, 400, "a step has failed: restart")
    d.arrow((150, 200), (150, 84), (765, 84), (765, 200), dashed=True)
    d.label(445, 76, "abort, from any state", "middle")
    d.arrow(swapped.right, (765, 408), (765, 256), dashed=True)
    d.label(750, 400, "abort", "end")
    return d


LENGTHS = {"A": 2, "B": 6, "C": 3, "D": 1, "E": 4}
TONES = {"A": "blue", "B": "amber", "C": "green", "D": "violet", "E": "red"}


def continuous_batching() -> Drawing:
    d = Drawing(
        860,
        350,
        "Five requests in two rows: static and continuous batching",
        "Requests that want 2, 6, 3, 1 and 4 tokens. In static batches a finished row stays empty until the longest of "
        "its batch ends: 13 steps. In continuous batching the next request takes the row at once: 10 steps.",
    )
    left, width = 180, 42
    static, continuous = schedules()
    num_steps = max(map(len, static))
    for step in range(num_steps):
        d.label(left + width * (step + 0.5), 72, f"_{step + 1}_", "middle")
    d.label(24, 72, "**step**")
    for y, name, rows in ((84, "static", static), (196, "continuous", continuous)):
        d.label(24, y + 21, f"**{name}**")
        for i, row in enumerate(rows):
            d.label(left - 12, y + 21 + 36 * i, f"_row {i + 1}_", "end")
            tones = " ".join(TONES.get(one, "empty") for one in row)
            d.cells(left, y + 36 * i, row, tones, width=width, height=32)
        used = sum(one != "" for row in rows for one in row)
        places = len(rows) * max(map(len, rows))
        share = f"{used} of {places} places give a token ({100 * used / places:.0f} %)"
        d.label(left, y + 92, f"{places // len(rows)} steps; {share}")
    x = 24
    for name, length in LENGTHS.items():
        d.box(x, 312, 22, 22, name, tone=TONES[name])
        d.label(x + 28, 327, f"_{length} token{'s' * (length > 1)}_")
        x += 104
    d.box(x, 312, 22, 22, tone="empty")
    d.label(x + 30, 327, "_gives no token_")
    return d


def schedules() -> tuple[list[list[str]], list[list[str]]]:
    """Two rows of names, one for each step; "" where a row computes nothing."""
    static: list[list[str]] = [[], []]
    names = list(LENGTHS)
    for pair in (names[i : i + 2] for i in range(0, len(names), 2)):
        longest = max(LENGTHS[name] for name in pair)
        for row, name in zip(static, [*pair, ""], strict=False):
            length = LENGTHS.get(name, 0)
            row += [name] * length + [""] * (longest - length)
    continuous: list[list[str]] = [[], []]
    for name in names:
        row = min(continuous, key=len)
        row += [name] * LENGTHS[name]
    longest = max(map(len, continuous))
    return static, [row + [""] * (longest - len(row)) for row in continuous]
