"""The states of a sequence.

WAITING --admitted--> RUNNING --last token--> FINISHED
   ^                    | ^                      ^
   +---- preempted -----+ |       abort ---------+  (from any state)
         or else        v |
                      SWAPPED        its blocks are in swap space, and nothing has to be computed again
"""

from __future__ import annotations

import enum


class SequenceState(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    SWAPPED = "swapped"
    FINISHED = "finished"


TRANSITIONS = {
    SequenceState.WAITING: {SequenceState.RUNNING, SequenceState.FINISHED},
    SequenceState.RUNNING: {SequenceState.WAITING, SequenceState.SWAPPED, SequenceState.FINISHED},
    SequenceState.SWAPPED: {SequenceState.RUNNING, SequenceState.WAITING, SequenceState.FINISHED},
    SequenceState.FINISHED: set(),
}
