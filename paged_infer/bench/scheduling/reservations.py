"""What paging is compared to: one contiguous chunk a request, reserved at its arrival (Orca, as the paper models it).

    chunk of 64    [ t t t t t t t t t t | . . . . . . | x x x x x x x x | - - - - ]
                     tokens stored         reserved:     internal: asked   rounding to the
                                           will be yet   for, never used   buddy's power of two

The size of the reservation: ``max``, the whole context; ``pow2``, the output rounded up to a power of two, which
assumes a rough prediction of its length; ``oracle``, exactly what will be used, which assumes an exact one.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from paged_infer.simulation.lengths import MAX_MODEL_LEN, RequestLengths


def _pow2_at_least(number: int) -> int:
    return 1 << (number - 1).bit_length()


RESERVATIONS: dict[str, Callable[[RequestLengths], int]] = {
    "max": lambda request: MAX_MODEL_LEN,
    "pow2": lambda request: min(MAX_MODEL_LEN, request.num_prompt + _pow2_at_least(request.num_output)),
    "oracle": lambda request: request.num_stored,
}


class BuddyMemory:
    """Slots handed out in chunks of powers of two, each aligned to its size (Knuth, TAOCP 1, 2.5).

    16 slots   [ 4 used | 4 free | 8 free ]      free the first: its buddy is free too, so both become 8,
                                                 and those 8 and their buddy become 16 again
    """

    def __init__(self, num_slots: int) -> None:
        self._free: dict[int, set[int]] = {1 << bit: set() for bit in range(num_slots.bit_length())}
        self._sizes: dict[int, int] = {}  # of the chunks handed out, by their start
        start = 0
        for size in sorted(self._free, reverse=True):
            if num_slots & size:
                self._free[size].add(start)
                start += size

    def take(self, num_slots: int) -> int | None:
        """Start of a chunk of at least so many slots, or None where no free chunk is large enough."""
        size = wanted = _pow2_at_least(num_slots)
        while size in self._free and not self._free[size]:
            size *= 2
        if size not in self._free:
            return None
        start = min(self._free[size])
        self._free[size].remove(start)
        while size > wanted:
            size //= 2
            self._free[size].add(start + size)
        self._sizes[start] = size
        return start

    def size_of(self, start: int) -> int:
        return self._sizes[start]

    def free(self, start: int) -> None:
        size = self._sizes.pop(start)
        while (buddy := start ^ size) in self._free.get(size, ()):
            self._free[size].remove(buddy)
            start, size = min(start, buddy), size * 2
        self._free[size].add(start)

    @property
    def num_free(self) -> int:
        return sum(size * len(starts) for size, starts in self._free.items())


class MemoryUse(Counter[str]):
    """The use of every slot, counted in slots and summed over the steps that were measured.

    slots       of the memory
    tokens      hold a token
    reserved    will hold a token of their request
    internal    belong to a request that will never use them
    held        belong to a request; with the rounding of a buddy's chunk

    And ``sequences``, summed over ``steps``; and ``preemptions``.
    """

    @property
    def shares(self) -> dict[str, float]:
        """Of the whole memory. ``external`` is the rest: rounding, holes that are too small, the watermark."""
        parts = {name: self[name] for name in ("tokens", "reserved", "internal")}
        parts["external"] = self["slots"] - sum(parts.values())
        return {name: number / self["slots"] for name, number in parts.items()}

    @property
    def fill(self) -> float:
        """Share of the slots in use that hold a token."""
        return self["tokens"] / self["held"]

    @property
    def mean_running(self) -> float:
        return self["sequences"] / self["steps"]


@dataclass(slots=True)
class _Running:
    request: RequestLengths
    start: int
    stored: int


def reserve_contiguously(
    requests: Iterable[RequestLengths], num_slots: int, ask: Callable[[RequestLengths], int]
) -> MemoryUse:
    """Serve the queue first come, first served: a request that fits runs, one token a step, to the end of its output.

    The steps in which a request waits are measured, once half of the requests have ended: then memory is the limit, and
    the running requests are of all ages.
    """
    memory, use = BuddyMemory(num_slots), MemoryUse()
    waiting = deque(requests)
    num_ended, num_to_end = 0, len(waiting) / 2
    running: list[_Running] = []
    while waiting:
        while waiting and (start := memory.take(ask(waiting[0]))) is not None:
            request = waiting.popleft()
            running.append(_Running(request, start, request.num_prompt))
        if not running:
            raise ValueError(f"{ask(waiting[0])} slots in one chunk: a memory of {num_slots} slots has none")
        if waiting and num_ended >= num_to_end:
            use.update(
                steps=1,
                slots=num_slots,
                tokens=sum(one.stored for one in running),
                reserved=sum(one.request.num_stored - one.stored for one in running),
                internal=sum(ask(one.request) - one.request.num_stored for one in running),
                held=sum(memory.size_of(one.start) for one in running),
                sequences=len(running),
            )
        for one in running:
            one.stored += 1
        ended = [one for one in running if one.stored > one.request.num_stored]
        running = [one for one in running if one.stored <= one.request.num_stored]
        for one in ended:
            memory.free(one.start)
        num_ended += len(ended)
    return use
