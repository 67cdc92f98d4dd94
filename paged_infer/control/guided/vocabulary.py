"""Which tokens may follow, by a walk through the trie of all tokens' bytes along the paths that the machine allows.

    tokens   a  ab  abc  b        nodes in order     a    ab   abc   b
    trie     a - b - c            depth              0    1    2     0
             b                    end of subtree     3    3    3     4     where to go on after a forbidden node

A token can be any bytes: half a character, or the end of one string and the beginning of the next. Special tokens have
no bytes, so no grammar allows them. The end-of-sequence tokens are allowed where the text may end.

A mask has a bit for each token: token i is bit i % 8 of byte i // 8. It is padded to a multiple of 4 bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable
from collections.abc import Sequence as ReadOnlyList

from paged_infer.control.guided.machine import GrammarError, Machine, State

MAX_FOLLOWED = 4_000_000  # configurations for one mask: some seconds; 150,000 tokens and a schema take a tenth of it


class Vocabulary:
    """The tokens' bytes as a trie, in preorder.

    Args:
        tokens: the bytes of each token id; None or b"" for a special one.
        eos_token_ids: tokens that end a text.
        size: number of tokens that the model has logits for, at least ``len(tokens)``.
    """

    def __init__(self, tokens: ReadOnlyList[bytes | None], eos_token_ids: Collection[int], size: int) -> None:
        self.tokens = [None if i in eos_token_ids else text or None for i, text in enumerate(tokens)]
        self.eos_token_ids = frozenset(eos_token_ids)
        self.num_mask_bytes = -(-size // 32) * 4
        ids: dict[bytes, list[int]] = {}
        for token_id, text in enumerate(self.tokens):
            if text is not None:
                ids.setdefault(text, []).append(token_id)
        self.ids = ids
        self.max_token_bytes = max(map(len, ids), default=0)
        self._bytes: list[int] = []
        self._depths: list[int] = []
        self._ends: list[int] = []
        self._ids: list[list[int]] = []
        self._below: list[int] = []  # the set of the bytes of all nodes below
        self._subtree_masks: dict[int, int] = {}
        self._lock = threading.Lock()  # while the trie is built
        self.everything = self._packed(ids.values())
        self.eos = sum(1 << token_id for token_id in self.eos_token_ids)

    def build(self) -> None:
        """Build the trie, once, from any thread. Libraries do without it, and 150,000 tokens take a second."""
        with self._lock:
            if not self._bytes:
                self._build()

    def _build(self) -> None:
        path: list[int] = []  # nodes from the root to the last one
        text_before = b""

        def leave(depth: int) -> None:
            while len(path) > depth:
                node = path.pop()
                self._ends[node] = len(self._bytes)
                if path:
                    self._below[path[-1]] |= self._below[node] | 1 << self._bytes[node]

        for text in sorted(self.ids):
            common = 0
            while common < min(len(text), len(text_before)) and text[common] == text_before[common]:
                common += 1
            leave(common)
            for depth in range(common, len(text)):
                path.append(len(self._bytes))
                self._bytes.append(text[depth])
                self._depths.append(depth)
                self._ends.append(0)
                self._ids.append([])
                self._below.append(0)
            self._ids[path[-1]] = self.ids[text]
            text_before = text
        leave(0)

    def mask(self, machine: Machine, state: State) -> bytes:
        """The tokens that may follow in ``state``; computed once and kept there.

        Raises:
            GrammarError: so ambiguous that it would take more than ``MAX_FOLLOWED``.
        """
        if state.mask is None:
            state.mask = self._walk(machine, state)
        return state.mask

    def _walk(self, machine: Machine, state: State) -> bytes:
        self.build()
        class_of, expand = machine.class_of, machine.expand
        node_bytes, depths, ends, ids, below = self._bytes, self._depths, self._ends, self._ids, self._below
        successors = [state.successors or expand(state)] * (self.max_token_bytes + 1)  # for each depth of the path
        bits, wide, limit = bytearray(self.num_mask_bytes), 0, machine.num_followed + MAX_FOLLOWED
        node, num_nodes = 0, len(node_bytes)
        while node < num_nodes:
            depth = depths[node]
            after = successors[depth][class_of[node_bytes[node]]]
            if after is None:
                node = ends[node]
                continue
            for token_id in ids[node]:
                bits[token_id >> 3] |= 1 << (token_id & 7)
            if below[node]:
                if after.successors is None and machine.num_followed > limit:
                    raise GrammarError("it is too ambiguous: what may come next takes too long to find")
                successors[depth + 1] = after.successors or expand(after)
                if not below[node] & ~after.loops:  # the machine stays in this state for all nodes below
                    wide |= self._subtree_mask(node)
                    node = ends[node]
                    continue
            node += 1
        return (int.from_bytes(bits, "little") | wide | (self.eos if state.is_accepting else 0)).to_bytes(
            self.num_mask_bytes, "little"
        )

    def _subtree_mask(self, node: int) -> int:
        if node not in self._subtree_masks:
            mask = self._packed(self._ids[node + 1 : self._ends[node]])
            self._subtree_masks[node] = int.from_bytes(mask, "little")
        return self._subtree_masks[node]

    def _packed(self, groups: Iterable[list[int]]) -> bytes:
        bits = bytearray(self.num_mask_bytes)
        for token_ids in groups:
            for token_id in token_ids:
                bits[token_id >> 3] |= 1 << (token_id & 7)
        return bytes(bits)

    def split(self, text: bytes) -> list[int]:
        """``text`` as tokens, greedily the longest at each position. Stops where no token fits."""
        found, at = [], 0
        while at < len(text):
            size = next(
                (n for n in range(min(self.max_token_bytes, len(text) - at), 0, -1) if text[at : at + n] in self.ids), 0
            )
            if not size:
                break
            found.append(self.ids[text[at : at + size]][0])
            at += size
        return found


def allowed_ids(mask: bytes) -> list[int]:
    """The ids of a mask's tokens."""
    return [i * 8 + bit for i, byte in enumerate(mask) if byte for bit in range(8) if byte >> bit & 1]
