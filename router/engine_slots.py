"""Engines by name and by number: arrays over engines have one place for each number."""

from __future__ import annotations

VACANT = ""
"""Name at a slot that no engine has."""


class EngineSlots:
    """Gives each engine the lowest free number; a number is free again when its engine leaves."""

    def __init__(self) -> None:
        self.names: list[str] = []
        """Of the engine at each slot, or VACANT."""
        self._slot_of: dict[str, int] = {}

    def __len__(self) -> int:
        """Slots that arrays over engines must have, vacant ones among them."""
        return len(self.names)

    def __contains__(self, name: str) -> bool:
        return name in self._slot_of

    def __getitem__(self, name: str) -> int:
        """The slot of an engine; raises KeyError for a name that none has."""
        return self._slot_of[name]

    def get(self, name: str) -> int | None:
        """The slot of an engine, or None."""
        return self._slot_of.get(name)

    def add(self, name: str) -> int:
        """Gives an engine a slot; the one it has, if it has one.

        Raises:
            ValueError: the name is empty.
        """
        if not name:
            raise ValueError("name: an engine's name must not be empty")
        if name in self._slot_of:
            return self._slot_of[name]
        slot = self.names.index(VACANT) if VACANT in self.names else len(self.names)
        if slot == len(self.names):
            self.names.append(VACANT)
        self.names[slot] = name
        self._slot_of[name] = slot
        return slot

    def remove(self, name: str) -> int:
        """Makes an engine's slot free and returns it; raises KeyError for an unknown name."""
        slot = self._slot_of.pop(name)
        self.names[slot] = VACANT
        return slot
