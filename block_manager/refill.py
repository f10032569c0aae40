"""How much of the host link a refill may take."""

from __future__ import annotations


class RefillThrottle:
    """Grants everything."""

    def available(self, now: float) -> int:
        """Bytes that a refill may load now."""
        return 1 << 18

    def spend(self, num_bytes: int, now: float) -> None:
        """A refill of so many bytes begins."""
