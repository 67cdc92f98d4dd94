"""What each baseline keeps, and how a block table finds it."""

from __future__ import annotations

from .drawing import Box, Drawing


def ladder() -> Drawing:
    d = Drawing(
        860,
        518,
        "The ladder: four ways to compute the next token",
        "Naive recomputes all tokens in every step and keeps nothing. Cached computes one token and keeps one reserved "
        "row. A static batch computes one token of each row and keeps reserved rows until the last has ended. Paged "
        "computes tokens of any sequences without padding and keeps them in blocks.",
    )
    d.label(190, 64, "**computed in one step**")
    d.label(500, 64, "**kept from step to step**")
    rungs = (
        ("naive", "grey", 76, 74),
        ("cached", "amber", 158, 74),
        ("static batch", "red", 240, 108),
        ("paged", "blue", 356, 102),
    )
    for name, tone, y, height in rungs:
        d.lane(16, y, 828, height)
        d.box(28, y + height / 2 - 17, 132, 34, f"**{name}**", tone=tone)

    d.cells(190, 90, [""] * 6, "solid-grey")
    d.label(190, 136, "_every token again; one request at a time_")
    d.label(500, 107, "nothing")

    d.cells(190, 172, [""] * 6, "empty empty empty empty empty solid-amber")
    d.label(190, 218, "_the newest token; one request at a time_")
    d.cells(500, 172, [""] * 12, "amber " * 5 + "empty " * 7)
    d.label(500, 218, "_one row, reserved at full length_")

    for i, (padding, stored, newest) in enumerate(((0, 5, "solid-red"), (2, 2, "grey"), (1, 4, "solid-red"))):
        y = 250 + 22 * i
        d.cells(190, y, [""] * 6, "empty " * 5 + newest, height=20)
        after = "grey " * (5 - padding - stored)  # the row's text has ended, and the batch goes on
        d.cells(500, y, [""] * 12, "grey " * padding + "red " * stored + after + "empty " * 7, height=20)
    d.label(342, 286, "_ended, still computed_")
    d.label(190, 334, "_the newest token of every row_")
    d.label(500, 334, "_reserved rows, until the longest text ends_")

    d.cells(190, 370, [""] * 5, "solid-blue solid-violet solid-green solid-green solid-green")
    d.label(190, 416, "_the tokens of any sequences, end to end:_")
    d.label(190, 434, "_one of a text, or several of a prompt_")
    pool = ("blue", 4), ("green", 3), ("", 0), ("violet", 4), ("blue", 2), ("", 0), ("violet", 1)
    for i, (tone, n) in enumerate(pool):
        d.cells(500 + 48 * i, 370, [""] * 4, f"{tone} " * n + "empty " * (4 - n), width=11)
    d.label(500, 416, "_blocks of a pool, in any order: taken when needed,_")
    d.label(500, 434, "_freed at the end, shared by texts that begin alike_")

    for x, tone, words in (
        (28, "solid-blue", "computed"),
        (146, "empty", "not computed; reserved, empty"),
        (398, "blue", "keys and values of a token"),
        (620, "grey", "padding, or after the end"),
    ):
        d.box(x, 480, 16, 16, tone=tone, radius=2)
        d.label(x + 23, 492, f"_{words}_")
    return d


SIZE = 4  # of a block
TABLES = {"X": (1, 4, 6), "Y": (1, 4, 3)}
LENGTHS = {"X": 10, "Y": 9}
TONES = {"X": "blue", "Y": "amber"}


def block_table() -> Drawing:
    d = Drawing(
        860,
        470,
        f"Block tables and the pool (block_size = {SIZE})",
        "Sequences X and Y have the same first eight tokens. The first two entries of both block tables name the same "
        "blocks, 1 and 4. Each has a third block of its own. The slot of a token is its block times the block size "
        "plus its offset in the block.",
    )
    pool_y = 196
    d.label(24, pool_y + 20, "**pool**")
    d.label(24, pool_y + 56, "**slots**")
    blocks = [_pool_block(d, block, 100 + 92 * block, pool_y) for block in range(8)]
    for name, token_y, table_y in (("X", 58, 100), ("Y", 410, 364)):
        d.label(24, token_y + 17, f"**tokens of {name}**")
        d.label(24, table_y + 18, f"**block table of {name}**")
        for index, block in enumerate(TABLES[name]):
            x = 170 + 136 * index
            tone = "violet" if _holders(block) == "XY" else TONES[name]
            n = min(SIZE, LENGTHS[name] - SIZE * index)
            d.cells(x, token_y, [*map(str, range(SIZE * index, SIZE * index + n)), *[""] * (SIZE - n)],
                    f"{tone} " * n + "empty " * (SIZE - n), width=30)  # fmt: skip
            entry = d.box(x + 28, table_y, 62, 28, str(block), tone=tone)
            if name == "X":
                d.arrow(entry.bottom, blocks[block].top, tone=tone)
            else:
                d.arrow(entry.top, blocks[block].bottom, tone=tone)
    position = LENGTHS["X"] - 1
    index, offset = divmod(position, SIZE)
    block = TABLES["X"][index]
    slot = block * SIZE + offset
    formula = d.box(
        590,
        352,
        246,
        98,
        f"**token {position} of X**",
        f"block = table[{position} // {SIZE}] = {block}",
        f"offset = {position} % {SIZE} = {offset}",
        f"slot = {block} · {SIZE} + {offset} = {slot}",
        tone="blue",
    )
    x_slot = blocks[block].x + 21 * offset + 9.5
    d.arrow((x_slot, formula.y), (x_slot, blocks[block].bottom[1]), tone="blue", dashed=True)
    return d


def _holders(block: int) -> str:
    return "".join(name for name, table in TABLES.items() if block in table)


def _pool_block(d: Drawing, block: int, x: float, y: float) -> Box:
    """Its number, how many tables hold it, and its slots."""
    holders = _holders(block)
    num_stored = max((min(SIZE, LENGTHS[n] - SIZE * TABLES[n].index(block)) for n in holders), default=0)
    tone = "violet" if len(holders) > 1 else TONES.get(holders, "empty")
    held = {0: "free", 1: "in 1 table", 2: "in 2 tables"}[len(holders)]
    d.box(x, y, 82, 40, f"block {block}", f"_{held}_")
    slots = [f"_{block * SIZE + i}_" for i in range(SIZE)]
    d.cells(x, y + 42, slots, f"{tone} " * num_stored + "empty " * (SIZE - num_stored), width=21, height=24)
    return Box(x, y, 82, 66)
