"""Which samples a person is asked to look at."""

from __future__ import annotations

import hashlib


def in_review_share(sample_id: str, share: float) -> bool:
    """Whether a sample belongs to the random `share` that is reviewed: fixed by its id, so it never changes."""
    if share >= 1.0:
        return True
    number = int.from_bytes(hashlib.sha256(sample_id.encode()).digest()[:8], "big")
    return number < share * 2**64
