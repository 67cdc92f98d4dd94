"""Block hashes: equal beginnings and nothing else are equal, and only new tokens are hashed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from paged_infer.control.blocks import hashing as block_hash
from paged_infer.control.blocks.hashing import extend_chain, root_hash

TOKENS = st.lists(st.integers(0, 2), max_size=12)


def chain(tokens: list[int], salt: str | None = None, block_size: int = 3) -> list[bytes]:
    hashes: list[bytes] = []
    extend_chain(hashes, root_hash(salt), tokens, block_size)
    return hashes


@given(TOKENS, TOKENS, st.sampled_from([None, "", "a"]), st.sampled_from([None, "", "a"]))
def test_hashes_are_equal_where_salt_and_all_tokens_so_far_are(a, b, salt_a, salt_b) -> None:
    for index, (one, other) in enumerate(zip(chain(a, salt_a), chain(b, salt_b), strict=False)):
        end = 3 * (index + 1)
        assert (one == other) == (salt_a == salt_b and a[:end] == b[:end])


@given(TOKENS, TOKENS)
def test_a_chain_grows_as_if_it_were_made_at_once(first, more) -> None:
    hashes = chain(first)
    extend_chain(hashes, root_hash(None), first + more, 3)
    assert hashes == chain(first + more) and len(hashes) == len(first + more) // 3


def test_only_new_blocks_are_hashed(monkeypatch) -> None:
    hashes, calls = chain([1] * 9), []
    monkeypatch.setattr(block_hash, "blake2b", lambda data, digest_size: calls.append(data) or _Digest())
    extend_chain(hashes, root_hash(None), [1] * 14, 3)
    assert len(calls) == 1 + 1  # the root, and one block


class _Digest:
    def digest(self) -> bytes:
        return b"x"
