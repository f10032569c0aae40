"""Whose turn it is: random interleavings of three kinds of work over the order alone."""

from __future__ import annotations

from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from block_manager.refill import TrafficClass
from model_executor.link_order import LinkOrder

DEMAND, ONBOARDING, REFILL = TrafficClass
Log = list[tuple[str, TrafficClass, int]]


def foreground(
    order: LinkOrder, log: Log, traffic: TrafficClass, works: list[int], number: int
) -> Iterator[bool]:
    """Each piece of work asks, copies its chunks, is done; yields between, False = it waits."""
    for place, chunks in enumerate(works):
        name = number * 100 + place
        order.ask(traffic)
        log.append(("ask", traffic, name))
        yield True
        for _ in range(chunks):
            while not order.may_begin(traffic):
                yield False
            log.append(("copy", traffic, name))
            yield True
        order.done(traffic)
        log.append(("done", traffic, name))
        yield True


def refill(order: LinkOrder, log: Log, chunks: int) -> Iterator[bool]:
    for chunk in range(chunks):
        while not order.may_begin(REFILL):
            yield False
        order.begin_refill_chunk()
        yield True  # It reads the host tier; much may be asked for meanwhile.
        log.append(("copy", REFILL, chunk))
        yield True
        order.end_refill_chunk()
        yield True


works = st.lists(st.integers(1, 4), max_size=4)


@given(
    demands=st.lists(works, min_size=1, max_size=2),
    onboardings=works,
    refills=st.lists(st.integers(0, 8), min_size=1, max_size=2),
    turns=st.lists(st.integers(0, 4), max_size=120),
)
def test_at_most_one_chunk_of_refill_is_copied_between_asking_for_rows_and_their_first_copy(
    demands: list[list[int]], onboardings: list[int], refills: list[int], turns: list[int]
) -> None:
    order, log = LinkOrder(), Log()
    actors = [foreground(order, log, DEMAND, one, n) for n, one in enumerate(demands)]
    actors.append(foreground(order, log, ONBOARDING, onboardings, 7))
    actors += [refill(order, log, one) for one in refills]
    for turn in turns:
        next(actors[turn % len(actors)], None)
    # Whoever is left goes on; none may wait for ever.
    while actors:
        steps = [next(actor, None) for actor in actors]
        assert any(step is not False for step in steps)
        actors = [actor for actor, step in zip(actors, steps, strict=True) if step is not None]
    for place, (what, traffic, name) in enumerate(log):
        if what == "ask":
            copies = [one for one in log[place:] if one[0] == "copy"]
            before = copies[: copies.index(("copy", traffic, name))]
            assert sum(one[1] is REFILL for one in before) <= 1
            if traffic is DEMAND:
                assert all(one[1] is not ONBOARDING for one in before)
    assert sum(one[:2] == ("copy", REFILL) for one in log) == sum(refills)
    assert order.may_begin(REFILL) and not order.is_refilling


def test_a_class_waits_for_those_before_it_only() -> None:
    order = LinkOrder()
    order.ask(ONBOARDING)
    assert [order.may_begin(one) for one in TrafficClass] == [True, True, False]
    order.ask(DEMAND)
    assert [order.may_begin(one) for one in TrafficClass] == [True, False, False]
    order.done(DEMAND)
    order.done(ONBOARDING)
    order.begin_refill_chunk()
    assert [order.may_begin(one) for one in TrafficClass] == [True, True, False]
    order.end_refill_chunk()
    assert order.may_begin(REFILL)
