"""Both tenants of a pool, written from the rules with lists and dicts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from block_manager.row_plan import NOWHERE, RefillPlan, RowMoves, RowPlan

Token = tuple[str, tuple[int, ...]]
"""What a token's K and V depend on: its user, and all events up to it."""


@dataclass
class Holder:
    """A running request as the KV tenant knows it."""

    tokens: list[Token]
    blocks: list[int]
    num_cached: int
    """Blocks that are reusable by now, counted from the first."""


class PlainKV:
    """The KV tenant: a free list in eviction order, readers and content of blocks."""

    def __init__(self, blocks: Sequence[int], block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.free = list(blocks)
        self.readers = dict.fromkeys(blocks, 0)
        self.content: dict[int, Token] = {}
        """Last token of a reusable block, in the order in which blocks became so."""
        self.user_of: dict[int, str | None] = {}
        self.held: dict[str, Holder] = {}

    def find(self, wanted: Sequence[Token]) -> list[int]:
        found: list[int] = []
        for token in wanted:
            holders = [block for block, held in self.content.items() if held == token]
            if not holders:
                break
            found.append(holders[0])
        return found

    def ends(self, tokens: Sequence[Token]) -> list[Token]:
        """Last token of each full block."""
        return list(tokens[self.block_tokens - 1 :: self.block_tokens])

    def allocate(self, name: str, wanted: list[Token], tokens: list[Token]) -> int | None:
        number = -(-len(tokens) // self.block_tokens)
        found = self.find(wanted)
        free = [block for block in self.free if block not in found]
        new = free[: number - len(found)]
        if len(found) + len(new) < number:
            return None
        self.free = free[len(new) :]
        for block in new:
            self.content.pop(block, None)
        for block in [*found, *new]:
            self.readers[block] += 1
        self.held[name] = Holder(tokens, [*found, *new], len(found))
        return len(found)

    def cache(self, name: str, ends: list[Token], num_computed: int, user: str | None) -> None:
        holder = self.held[name]
        last = min(num_computed // self.block_tokens, len(ends))
        for place in range(holder.num_cached, last):
            self.content[holder.blocks[place]] = ends[place]
            self.user_of[holder.blocks[place]] = user
        holder.num_cached = max(last, holder.num_cached)

    def let_go(self, name: str) -> None:
        dead: list[int] = []
        for block in self.held.pop(name).blocks[::-1]:
            self.readers[block] -= 1
            if not self.readers[block]:
                (self.free if block in self.content else dead).append(block)
        self.free = dead + self.free

    def forget(self, blocks: Iterable[int]) -> int:
        return sum(self.content.pop(block, None) is not None for block in blocks)

    def grow(self, pages: list[int]) -> None:
        self.free = pages + self.free
        self.readers |= dict.fromkeys(pages, 0)

    def shrink(self, limit: int) -> list[int]:
        leaving, self.free = self.free[:limit], self.free[limit:]
        for page in leaving:
            self.content.pop(page, None)
            del self.readers[page]
        return leaving


@dataclass
class PlainEMB:
    """The EMB tenant. It learns from each plan which of the allowed choices was made."""

    pages: set[int]
    rows_per_page: int
    num_rows: int
    slot_of: dict[int, int] = field(default_factory=dict)
    heat: Counter[int] = field(default_factory=Counter)
    last_use: dict[int, int] = field(default_factory=dict)
    """Step that last used a row."""
    accesses: int = 0
    num_steps: int = 0
    plan: RowPlan | None = None
    refill: RefillPlan | None = None
    unseen: list[tuple[int, int]] = field(default_factory=list)
    """Rows that a refill has yet to look at, in order, the table three times over: each with the
    share of the slots (16 = a sixteenth) of which it must deserve one."""
    hand: int = 0
    looks_at_all: bool = True
    """Whether the tenant is so small that it looks at all its slots and rows to choose the best."""
    refill_window: int = 1 << 16

    def slots_of(self, pages: Iterable[int]) -> set[int]:
        first = (page * self.rows_per_page for page in pages)
        return {slot + place for slot in first for place in range(self.rows_per_page)}

    @property
    def reserved(self) -> set[int]:
        reserved = set() if self.refill is None else set(self.refill.slots.tolist())
        if self.plan is not None:
            reserved |= set(self.plan.slots[self.plan.admitted].tolist())
        return reserved

    @property
    def free(self) -> set[int]:
        return self.slots_of(self.pages) - self.reserved - set(self.slot_of.values())

    def count(self, batch: dict[int, int]) -> None:
        """TinyLFU's counts: they stop at 255 and are halved after ten accesses per slot.

        Fewer than eight pages count as eight.
        """
        for row, times in batch.items():
            self.heat[row] = min(255, self.heat[row] + times)
        self.accesses += sum(batch.values())
        if self.accesses >= 10 * max(8, len(self.pages)) * self.rows_per_page:
            self.accesses = 0
            self.heat = Counter({row: count // 2 for row, count in self.heat.items()})

    def take_plan(self, batch: dict[int, int], plan: RowPlan) -> None:
        free = self.free
        self.count(batch)
        self.num_steps += 1
        rows, slots, staging = plan.row_ids.tolist(), plan.slots.tolist(), plan.staging.tolist()
        assert rows == list(batch)
        assert plan.resident.tolist() == [row in self.slot_of for row in rows]
        placed = {row: slot for row, slot in zip(rows, slots, strict=True) if slot != NOWHERE}
        staged = {row: at for row, at in zip(rows, staging, strict=True) if at != NOWHERE}
        assert placed.keys() ^ staged.keys() == set(rows)
        assert sorted(staged.values()) == [*range(len(staged))]
        hits = {row: slot for row, slot in self.slot_of.items() if row in batch}
        assert hits.items() <= placed.items()
        self.last_use |= dict.fromkeys(hits, self.num_steps)
        admitted = {row: slot for row, slot in placed.items() if row not in hits}
        self.displace(admitted, [*staged], free)
        self.last_use |= dict.fromkeys(admitted, self.num_steps)
        self.plan = plan

    def displace(self, admitted: dict[int, int], left: list[int], free: set[int]) -> None:
        """Judges who got a slot, and whose it was.

        The hottest rows get free slots first, then those of colder rows; a tenant that looks at a
        part of its slots only may leave rows without, and others colder than they.
        """
        taken = set(admitted.values())
        assert len(taken) == len(admitted)
        evicted = {row: slot for row, slot in self.slot_of.items() if slot in taken}
        assert taken - set(evicted.values()) <= free
        spared = [
            row
            for row in self.slot_of.keys() - evicted.keys()
            if self.last_use[row] != self.num_steps
        ]
        assert all(self.last_use[row] != self.num_steps for row in evicted)
        assert len(evicted) == max(0, len(admitted) - len(free))
        newcomers = sorted((self.heat[row] for row in admitted), reverse=True)[len(free) :]
        victims = sorted((self.heat[row], self.last_use[row]) for row in evicted)
        assert all(new > old for new, (old, _) in zip(newcomers, victims, strict=True))
        hottest_left = max((self.heat[row] for row in left), default=0)
        assert all(hottest_left <= self.heat[row] for row in admitted)
        if self.looks_at_all:
            coldest = max(victims, default=(-1, -1))
            assert all(hottest_left <= self.heat[row] for row in spared)
            assert all((self.heat[row], self.last_use[row]) >= coldest for row in spared)
        for row in evicted:
            del self.slot_of[row]

    def close_plan(self, *, loaded: bool) -> None:
        assert self.plan is not None
        if loaded:
            rows, slots = self.plan.row_ids.tolist(), self.plan.slots.tolist()
            self.slot_of |= {r: s for r, s in zip(rows, slots, strict=True) if s != NOWHERE}
        self.plan = None

    def grow(self, pages: list[int]) -> None:
        assert not self.pages & set(pages)
        self.pages |= set(pages)
        if pages:
            self.look_at_all()

    def look_at_all(self) -> None:
        ring = [(self.hand + place) % self.num_rows for place in range(self.num_rows)]
        self.unseen = [(share, row) for share in (16, 4, 1) for row in ring]

    def movable(self) -> set[int]:
        """Pages that no load is under way to."""
        return self.pages - {slot // self.rows_per_page for slot in self.reserved}

    def shrink(self, leaving: list[int], moves: RowMoves) -> None:
        """Judges which pages leave, which of their rows stay, and where these go."""

        def heat(page: int) -> int:
            slots = self.slots_of([page])
            return sum(self.heat[row] for row, slot in self.slot_of.items() if slot in slots)

        staying = self.movable() - set(leaving)
        assert self.movable() >= set(leaving) and len(set(leaving)) == len(leaving)
        hottest = max(map(heat, leaving), default=0)
        assert not self.looks_at_all or all(heat(page) >= hottest for page in staying)
        gone = self.slots_of(leaving)
        self.pages -= set(leaving)
        on_them = {row: slot for row, slot in self.slot_of.items() if slot in gone}
        for row in on_them:
            del self.slot_of[row]
        row_at = {slot: row for row, slot in on_them.items()}
        copies = zip(moves.sources.tolist(), moves.destinations.tolist(), strict=True)
        moved = {row_at[source]: destination for source, destination in copies}
        assert all(self.heat[row] for row in moved)
        self.displace(moved, [row for row in on_them if row not in moved], self.free)
        self.slot_of |= moved

    def forget(self, moves: RowMoves) -> None:
        lost = set(moves.destinations.tolist())
        self.slot_of = {row: slot for row, slot in self.slot_of.items() if slot not in lost}

    @property
    def wants_refill(self) -> bool:
        return bool(self.unseen) and bool(self.free) and self.refill is None

    def take_refill(self, limit: int, refill: RefillPlan | None) -> None:
        if not self.wants_refill or limit < 1:
            assert refill is None
            return
        counts = sorted(self.heat.values(), reverse=True)
        found: list[int] = []
        last, pass_of_found = len(self.unseen) - self.refill_window, 0
        while len(self.unseen) > max(0, last) and len(found) < min(limit, len(self.free)):
            if found and self.unseen[0][0] != pass_of_found:
                break  # What was found in a pass is loaded before the next one begins.
            share, row = self.unseen.pop(0)
            self.hand = (row + 1) % self.num_rows
            num_slots = len(self.pages) * self.rows_per_page // share
            # Hotter than the hottest row for which there would be no slot.
            least = 1 + (counts[num_slots] if len(counts) > num_slots else 0)
            if self.heat[row] >= least and row not in self.slot_of:
                found.append(row)
                pass_of_found = share
        found.sort(key=lambda row: -self.heat[row])
        assert found == ([] if refill is None else refill.row_ids.tolist())
        if refill is not None:
            slots = refill.slots.tolist()
            assert len(set(slots)) == len(slots) and self.free >= set(slots)
        self.refill = refill

    def close_refill(self, *, loaded: bool) -> None:
        assert self.refill is not None
        if loaded:
            pairs = zip(self.refill.row_ids.tolist(), self.refill.slots.tolist(), strict=True)
            news = {row: slot for row, slot in pairs if row not in self.slot_of}
            self.slot_of |= news
            self.last_use |= dict.fromkeys(news, self.num_steps)
        else:
            self.look_at_all()
        self.refill = None
