"""The hash of a full block of tokens is chained, so that equal hashes mean equal beginnings.

    salt --> root --+--> h0 = H(root, t0..t15) --+--> h1 = H(h0, t16..t31) --> ...

``h1`` stands for all of t0..t31 and the salt, not for its own sixteen tokens alone: keys and values depend on every
token before them. H is BLAKE2b with 32 bytes, so finding two beginnings of one hash is infeasible.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as ReadOnlyList
from hashlib import blake2b

_DIGEST_BYTES = 32


def root_hash(salt: str | None) -> bytes:
    """Where a chain begins. Requests of different salts share nothing; None is a salt of its own."""
    salted = b"" if salt is None else b"salt" + salt.encode("utf-8", "surrogatepass")  # any str, text or not
    return blake2b(salted, digest_size=_DIGEST_BYTES).digest()


def extend_chain(
    chain: list[bytes], root: bytes, token_ids: ReadOnlyList[int], block_size: int, num_tokens: int | None = None
) -> None:
    """Append the hashes of those full blocks of ``token_ids`` that ``chain`` lacks. Linear in the new tokens only.

    ``num_tokens``: how many of the tokens to hash; by default all.
    """
    for index in range(len(chain), (len(token_ids) if num_tokens is None else num_tokens) // block_size):
        tokens = array("q", token_ids[index * block_size : (index + 1) * block_size])
        parent = chain[-1] if chain else root
        chain.append(blake2b(parent + tokens.tobytes(), digest_size=_DIGEST_BYTES).digest())
