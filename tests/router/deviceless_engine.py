"""Both tenants of an engine and what it publishes, without a model: books under random use."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from block_manager.block_hash import BlockHash, hash_blocks, root_hash, user_tag
from block_manager.block_pool import BlockPool
from block_manager.embedding_cache import EmbeddingCache
from block_manager.kv_cache_manager import KVCacheManager
from block_manager.row_digest import position_of_rows
from helm_engine.config import ResidencyConfig
from helm_engine.residency_publisher import ResidencyPublisher

BLOCK_TOKENS = 4
NUM_PAGES, NUM_KV_PAGES = 48, 28
ROWS_PER_PAGE = 4
NUM_ROWS, NUM_POSITIONS = 200, 64
NUM_USERS = 6
LONGEST = 40
NAME, MODEL = "one", "toy"


@dataclass(frozen=True)
class Tokens:
    """A history as the pool's events read it."""

    rows: npt.NDArray[np.int64]
    features: npt.NDArray[np.int64]


def digest_of(user: int) -> bytes:
    return f"user {user:<11}".encode()


def history(user: int, length: int) -> Tokens:
    """The same beginning for each length; every third token reads no row."""
    rng = np.random.default_rng(user)
    rows = rng.integers(1, NUM_ROWS, LONGEST)
    rows[::3] = -1
    return Tokens(rows[:length], rng.integers(0, 9, (LONGEST, 2))[:length])


def hashes_of(user: int, length: int) -> list[BlockHash]:
    tokens = history(user, length)
    inputs = np.column_stack([tokens.rows, tokens.features])
    return hash_blocks(root_hash("m", digest_of(user)), inputs, BLOCK_TOKENS)


class Books:
    """Two tenants that share pages."""

    def __init__(self) -> None:
        pool = BlockPool(np.arange(NUM_KV_PAGES), NUM_PAGES)
        self.kv = KVCacheManager(pool, BLOCK_TOKENS)
        pages = np.arange(NUM_KV_PAGES, NUM_PAGES)
        self.emb = EmbeddingCache(pages, ROWS_PER_PAGE, NUM_ROWS, NUM_PAGES)
        self._number = 0

    def visit(self, user: int, length: int, others: int = 0) -> None:
        """One request, or some of one user at once, whose equal content is computed anew."""
        names = []
        for _ in range(1 + others):
            self._number += 1
            name, hashes = f"r{self._number}", hashes_of(user, length)
            if self.kv.allocate(name, hashes, length, length - 1) is None:
                break
            names.append(name)
        for name in names:
            for computed in (length // 2, length):
                self.kv.cache_blocks(
                    name, hashes, computed, user_tag(digest_of(user)), history(user, length)
                )
        self.kv.free(*names)

    def use_rows(self, first: int, number: int, is_loaded: bool = True) -> None:
        rows = np.unique(np.arange(first, first + 3 * number, 3) % NUM_ROWS)
        plan = self.emb.plan(rows, np.full(len(rows), 2))
        if is_loaded:
            self.emb.commit(plan)
        else:
            self.emb.abandon(plan)

    def move(self, pages: int, copies_fail: bool = False) -> None:
        """Pages to EMB, or to KV below 0; each tenant keeps some."""
        if pages > 0:
            self.emb.grow(self.kv.pool.shrink(min(pages, self.kv.pool.num_pages - 12)))
        else:
            given, moves = self.emb.shrink(min(-pages, self.emb.num_pages - 2))
            if copies_fail:
                self.emb.forget(moves)
            self.kv.pool.grow(given)

    def refill(self, number: int, is_loaded: bool) -> None:
        plan = self.emb.plan_refill(number)
        if plan is not None:
            if is_loaded:
                self.emb.commit_refill(plan)
            else:
                self.emb.abandon_refill(plan)

    def forget_user(self, user: int) -> None:
        self.kv.forget_user(user_tag(digest_of(user)))

    def reset(self) -> None:
        assert self.kv.pool.reset_prefix_cache()

    def act(self, rng: np.random.Generator) -> None:
        """Anything that may happen between two reports."""
        number = int(rng.integers(1, 7))
        match int(rng.integers(0, 10)):
            case 0 | 1 | 2 | 3:
                length = int(rng.integers(1, LONGEST))
                self.visit(int(rng.integers(NUM_USERS)), length, int(rng.integers(0, 2)))
            case 4 | 5:
                self.use_rows(int(rng.integers(NUM_ROWS)), 4 * number, bool(rng.integers(0, 8)))
            case 6:
                self.move(number - 4 or 1, bool(rng.integers(0, 2)))
            case 7:
                self.refill(4 * number, bool(rng.integers(0, 2)))
            case 8:
                self.forget_user(int(rng.integers(NUM_USERS)))
            case _:
                if not rng.integers(0, 6):
                    self.reset()

    # What the books hold, asked one by one.

    def blocks(self) -> Counter[bytes]:
        index = self.kv.pool.cached_block_hash_to_block
        known = {each for user in range(NUM_USERS) for each in hashes_of(user, LONGEST)}
        counts: dict[bytes, int] = {each: len(index.holders(each)) for each in known}
        return +Counter(counts)

    def rows(self) -> npt.NDArray[np.int64]:
        return np.flatnonzero(self.emb.slot_of_row >= 0)

    def positions(self) -> set[int]:
        return set(position_of_rows(self.rows(), NUM_ROWS, NUM_POSITIONS).tolist())


class DevicelessEngine:
    """Books and their publisher; `restart` gives it new ones at the same addresses."""

    def __init__(self, buffer_batches: int = 10_000, redact: bool = False) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="helm-")
        folder = Path(self._folder.name)
        self.config = ResidencyConfig(
            endpoint=f"ipc://{folder}/events",
            replay_endpoint=f"ipc://{folder}/replay",
            redact=redact,
            buffer_batches=buffer_batches,
            digest_positions=NUM_POSITIONS,
            digest_interval_s=0.0,
            engine_name=NAME,
        )
        self._start()

    def _start(self) -> None:
        self.books = Books()
        self.publisher = ResidencyPublisher(self.config, MODEL, self.books.kv, self.books.emb)

    @property
    def addresses(self) -> tuple[str, str]:
        assert self.config.endpoint is not None
        assert self.config.replay_endpoint is not None
        return self.config.endpoint, self.config.replay_endpoint

    def report(self) -> None:
        """What the engine does between steps."""
        self.publisher.report()

    def restart(self) -> None:
        self.publisher.close()
        self._start()

    def __enter__(self) -> DevicelessEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.publisher.close()
        self._folder.cleanup()
