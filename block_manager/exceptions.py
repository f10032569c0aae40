"""What a caller of the bookkeeping may get wrong, by name."""

from __future__ import annotations


class IntegrityError(AssertionError):
    """The pool's books contradict each other: a bug, never a request's fault."""
