"""Checkers of chapter 06, kernels in Triton."""

from __future__ import annotations

import math

import torch
from triton_lab import launches

from checks import checker, device, expect, expect_tensor


@checker
def row_softmax(answer):
    """x [R, W] -> softmax of each row, by a Triton kernel."""
    generator = torch.Generator().manual_seed(6)

    def softmax_of(x, asked):
        with launches() as launched:
            found = answer(x.clone())
        expect_tensor(found, x, asked)
        expect(bool(launched), f"{asked}: no kernel was launched: write one, and call it with `launch`")
        return found

    for rows, width in ((3, 8), (4, 5), (2, 1), (1, 33)):
        x = (torch.randn(rows, width, generator=generator) - 3).to(device)  # maxima below 0, so that a 0 shows
        asked = f"row_softmax of x [{rows}, {width}]"
        found = softmax_of(x, asked)
        right, room = x.softmax(dim=1), 1 << (width - 1).bit_length()
        padded = torch.nn.functional.pad(x, (0, room - width)).softmax(dim=1)[:, :width]
        expect(
            room == width or not torch.allclose(found, padded, atol=1e-5),
            f"{asked}: the {room - width} masked columns were read as 0 and counted in the sum; let them read as -inf",
        )
        expect(not found.isnan().any(), f"{asked} has NaN")
        expect(
            rows == 1 or not torch.allclose(found, x.softmax(dim=0), atol=1e-5),
            f"{asked}: columns add up to 1 instead of rows",
        )
        expect(torch.allclose(found, right, atol=1e-5), f"{asked} is off by up to {(found - right).abs().max():.2g}")
    large = torch.tensor([[200.0, 199.0, -200.0]], device=device)
    expect(
        torch.allclose(softmax_of(large, "row_softmax of [200, 199, -200]"), large.softmax(dim=1), atol=1e-5),
        "scores of 200 overflow: subtract the row's maximum before the exponential",
    )
    hidden = torch.tensor([[1.0, -math.inf, 2.0]], device=device)
    expect(
        torch.allclose(softmax_of(hidden, "row_softmax of [1, -inf, 2]"), hidden.softmax(dim=1), atol=1e-5),
        "a score of -inf, a hidden key, has to get the weight 0 and leave the others right",
    )


@checker
def register_budget(answer):
    """num_warps, num_blocks -> registers a thread with which so many blocks fit on an SM."""
    for num_warps, num_blocks in ((4, 4), (8, 3), (8, 1), (4, 5), (1, 32), (16, 5), (4, 16), (2, 31)):
        found = answer(num_warps, num_blocks)
        asked = f"register_budget({num_warps}, {num_blocks})"
        expect(found is not None, f"{asked} gives None: is the `return` missing?")
        warps = num_warps * num_blocks
        right = 0 if warps > 64 else min(255, 65_536 // (32 * warps) // 8 * 8)
        likely = {
            65_536 // (32 * warps): "a thread gets registers in units of 8, and no more than 255",
            65_536 // (32 * warps) // 8 * 8: f"{warps} warps are more than the 64 of an SM"
            if warps > 64
            else "no thread has more than 255 registers",
            min(255, 65_536 // (32 * warps)): "a warp gets registers in units of 256, so a thread in units of 8"
            if warps <= 64
            else f"{warps} warps are more than the 64 of an SM",
            min(255, 65_536 // warps // 8 * 8): "a warp is 32 threads, and each has its registers",
            min(255, 65_536 // (32 * num_warps) // 8 * 8): f"all {num_blocks} blocks share the registers of the SM",
        }
        if warps > 64:
            likely[min(255, 65_536 // (32 * warps) // 8 * 8)] = f"{warps} warps are more than the 64 of an SM"
        fault = likely.get(found, f"{right} is the largest")
        expect(found == right, f"{asked} gives {found}: {fault}")


@checker
def matmul_traffic(answer):
    """M, N, K, block_m, block_n -> numbers that the tiles of a product read and write."""
    shapes = ((32, 64, 8, 16, 16), (40, 56, 24, 16, 16), (5, 100, 7, 16, 32), (64, 64, 64, 64, 16))
    for M, N, K, block_m, block_n in shapes:
        found = answer(M, N, K, block_m, block_n)
        asked = f"matmul_traffic({M}, {N}, {K}, {block_m}, {block_n})"
        expect(found is not None, f"{asked} gives None: is the `return` missing?")
        down, across = -(-M // block_m), -(-N // block_n)
        right = M * K * across + K * N * down + M * N
        likely = {
            M * K * across + K * N * down: "C is written, too",
            M * K + K * N + M * N: "that is each number once, but every program reads its own rows and columns",
            M * K * down + K * N * across + M * N: "A is read for each column of tiles, and B for each row of tiles",
            M * K * (N // block_n) + K * N * (M // block_m) + M * N: "a tile that sticks out is a tile: round up",
            down * across * (block_m * K + K * block_n) + M * N: "places past the edge are masked, and not read",
            down * across * (block_m * K + K * block_n + block_m * block_n): (
                "places past the edge are masked, and neither read nor written"
            ),
        }
        fault = likely.get(found, f"{right} is what the programs touch")
        expect(found == right, f"{asked} gives {found}: {fault}")


@checker
def store(answer):
    """k, v, k_cache, v_cache, rows: copies rows to rows by one launch; -1 is nowhere."""
    generator = torch.Generator().manual_seed(8)
    for num_tokens, width, chosen in ((3, 8, [4, 0, 2]), (4, 6, [1, -1, 5, 0]), (2, 5, [-1, -1])):
        k, v = (torch.randn(num_tokens, width, generator=generator).to(device) for _ in range(2))
        rows = torch.tensor(chosen, device=device)
        caches = [torch.full((7, width), fill, device=device) for fill in (-7.0, -8.0)]
        wanted = [cache.clone() for cache in caches]
        for cache, source in zip(wanted, (k, v), strict=True):
            cache[rows[rows >= 0]] = source[rows >= 0]
        with launches() as launched:
            answer(k.clone(), v.clone(), *caches, rows.clone())
        asked = f"store with rows {chosen} of width {width}"
        expect(bool(launched), f"{asked}: no kernel was launched: write one, and call it with `launch`")
        expect(len(launched) == 1, f"{asked}: {len(launched)} launches, and one kernel can store both")
        nowhere = -1 in chosen and any(
            torch.equal(cache[-1], source[chosen.index(-1)]) for cache, source in zip(caches, (k, v), strict=True)
        )
        expect(not nowhere, f"{asked}: a token of row -1 was written to the last row: it belongs nowhere")
        for name, cache, right in zip(("k_cache", "v_cache"), caches, wanted, strict=True):
            stray = (cache != right).any(dim=1) & torch.tensor([i not in chosen for i in range(7)], device=device)
            expect(
                not stray.any(),
                f"{asked}: row {stray.nonzero().flatten().tolist()[:1]} of {name} belongs to no token and was changed: "
                "mask the columns past the width",
            )
            expect(cache.equal(right), f"{asked}: {name} does not hold the rows where they belong")
