"""Settings of the whole suite."""

from __future__ import annotations

from hypothesis import settings

# No test asserts a time: on a busy machine one slow example would be a false alarm.
settings.register_profile("suite", deadline=None, print_blob=True)
settings.load_profile("suite")
