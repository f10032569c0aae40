"""The memory under both tenants: what is written where, and steps that are carried out on it."""

from __future__ import annotations

from dataclasses import dataclass

from block_manager.row_plan import NOWHERE, RefillPlan, RowMoves, RowPlan
from tests.block_manager.plain_tenants import Token


@dataclass
class Chunk:
    """What a step computes of a request: tokens start .. end - 1."""

    name: str
    tokens: list[Token]
    blocks: list[int]
    start: int
    end: int


@dataclass
class Step:
    """A step between its plan and its end."""

    chunks: list[Chunk]
    rows: RowPlan
    dead_blocks: list[int]
    dead_slots: list[int]
    moves: RowMoves
    begun: RefillPlan | None
    refilled: RefillPlan | None
    refill_failed: RefillPlan | None
    is_executed: bool = False


class PlainMemory:
    """What is written where. A page is the same bytes for both tenants: each destroys the other's.

    None stands for poison, and for what a write of the other tenant has made of it.
    """

    def __init__(self, num_pages: int, block_tokens: int, rows_per_page: int) -> None:
        self.block_tokens, self.rows_per_page = block_tokens, rows_per_page
        self.tokens: list[list[Token | None]] = [[None] * block_tokens for _ in range(num_pages)]
        self.rows: list[list[int | None]] = [[None] * rows_per_page for _ in range(num_pages)]

    def write_token(self, page: int, place: int, token: Token | None) -> None:
        self.rows[page] = [None] * self.rows_per_page
        self.tokens[page][place] = token

    def write_row(self, slot: int, row: int | None) -> None:
        page, place = divmod(slot, self.rows_per_page)
        self.tokens[page] = [None] * self.block_tokens
        self.rows[page][place] = row

    def row_at(self, slot: int) -> int | None:
        page, place = divmod(slot, self.rows_per_page)
        return self.rows[page][place]

    def poison_page(self, page: int) -> None:
        self.rows[page] = [None] * self.rows_per_page
        self.tokens[page] = [None] * self.block_tokens

    def copy_rows(self, moves: RowMoves) -> None:
        """All at once, as a device may make the copies in any order."""
        held = [self.row_at(slot) for slot in moves.sources.tolist()]
        for slot, row in zip(moves.destinations.tolist(), held, strict=True):
            self.write_row(slot, row)

    def execute(self, step: Step, until: str = "end") -> None:
        """Does what the step says, or breaks down in a phase of it."""
        step.is_executed = True
        if until != "move":
            self.copy_rows(step.moves)
        for page in step.dead_blocks:
            self.poison_page(page)
        for slot in step.dead_slots:
            self.write_row(slot, None)
        if step.refilled is not None:
            for row, slot in zip(step.refilled.row_ids, step.refilled.slots, strict=True):
                self.write_row(int(slot), int(row))
        loaded = step.rows.admitted[:: 2 if until == "load" else 1]
        if until in ("load", "end"):
            for place in loaded.tolist():
                self.write_row(int(step.rows.slots[place]), int(step.rows.row_ids[place]))
        if until == "end":
            self.compute(step)

    def compute(self, step: Step) -> None:
        """Every row and every token that is read must be the one that was asked for."""
        for row, slot in zip(step.rows.row_ids.tolist(), step.rows.slots.tolist(), strict=True):
            assert slot == NOWHERE or self.row_at(slot) == row
        for chunk in step.chunks:
            assert self.read(chunk.blocks, chunk.start) == chunk.tokens[: chunk.start]
            for place in range(chunk.start, chunk.end):
                page = chunk.blocks[place // self.block_tokens]
                self.write_token(page, place % self.block_tokens, chunk.tokens[place])

    def read(self, blocks: list[int], number: int) -> list[Token | None]:
        held = [token for block in blocks for token in self.tokens[block]]
        return held[:number]
