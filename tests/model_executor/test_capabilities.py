"""What may be cached, chunked and split: the table of models, and what their K and V really do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from helm_engine.clock import VirtualClock
from helm_engine.engine_loader import load_engine
from helm_engine.protocol import parse_request
from helm_engine.request import Request
from model_executor.capabilities import StepRules, capabilities_of, step_rules
from model_executor.step import CandidateScoring, SchedulerOutput
from tests.toy_models import TOY_CONFIGS, toy_config, toy_engine_config, write_toy_model

CONTEXTUAL = [{"name": "user", "num_rows": 9000}, {"name": "device", "num_rows": 4}]
OPEN_STU = {"contextual": CONTEXTUAL, "contextual_rows_see_history": True}
OPEN_NVIDIA = {"contextual": CONTEXTUAL}


class Case(NamedTuple):
    """A model and what is expected of it."""

    dialect: str
    changes: dict[str, Any]
    reuse: bool
    chunkable: bool
    unit: int


CASES = {
    "research": Case("research", {}, True, True, 1),
    "sasrec": Case("sasrec", {}, True, True, 1),
    "stu": Case("stu", {"contextual": CONTEXTUAL}, False, True, 1),
    "stu without context": Case("stu", {"contextual": []}, False, True, 1),
    "stu with a window": Case(
        "stu", {"contextual": CONTEXTUAL, "max_attention_window": 3}, False, True, 1
    ),
    "open stu": Case("stu", OPEN_STU, False, False, 1),
    "open stu of one layer": Case("stu", {**OPEN_STU, "num_layers": 1}, False, True, 1),
    "open stu of two layers": Case("stu", {**OPEN_STU, "num_layers": 2}, False, False, 1),
    "open stu without context": Case("stu", {**OPEN_STU, "contextual": []}, False, True, 1),
    "nvidia": Case("nvidia", {}, True, True, 1),
    "nvidia in groups": Case("nvidia", {"target_group_size": 4}, True, True, 4),
    "open nvidia": Case("nvidia", OPEN_NVIDIA, False, False, 1),
    "open nvidia in groups": Case(
        "nvidia", {**OPEN_NVIDIA, "target_group_size": 3, "action": None}, False, False, 3
    ),
    "open nvidia of one layer": Case("nvidia", {**OPEN_NVIDIA, "num_layers": 1}, True, True, 1),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


# ---------------------------------------------------------------- the table


@every_case
def test_capabilities_are_those_of_the_model_and_not_of_its_dialect(case: Case) -> None:
    found = capabilities_of(toy_config(case.dialect, **case.changes))
    assert found.cross_request_reuse.value is case.reuse
    assert found.chunkable.value is case.chunkable
    assert found.microbatch_unit.value == case.unit


@every_case
def test_every_value_comes_with_its_reason(case: Case) -> None:
    described = capabilities_of(toy_config(case.dialect, **case.changes)).describe()
    assert described.keys() == {"cross_request_reuse", "chunkable", "microbatch_unit"}
    for entry in described.values():
        assert entry.keys() == {"value", "reason"}
        assert len(entry["reason"]) > 30


def test_reason_of_a_group_names_its_size() -> None:
    found = capabilities_of(toy_config("nvidia", target_group_size=17))
    assert "17" in found.microbatch_unit.reason


@pytest.mark.parametrize(
    ("case", "rules", "min_tokens"),
    [
        ("research", StepRules(True, 1, True), 2),
        ("sasrec", StepRules(True, 1, True), 2),
        ("stu", StepRules(True, 1, False), 1),
        ("open stu", StepRules(False, 1, False, 3), 3),
        ("nvidia in groups", StepRules(True, 4, False), 4),
        ("open nvidia in groups", StepRules(False, 3, False, 3), 3),
    ],
)
def test_rules_of_the_scheduler_follow_from_them(
    case: str, rules: StepRules, min_tokens: int
) -> None:
    config = toy_config(CASES[case].dialect, **CASES[case].changes)
    assert step_rules(config, capabilities_of(config)) == rules
    assert rules.min_tokens == min_tokens


# ---------------------------------------------------------------- what K and V do

ITEMS = [7, 3, 21, 59, 14, 9, 3, 40, 2, 33, 18, 5]
TIMES = [100, 160, 4000, 4001, 9000, 20_000, 50_000, 10**5, 10**6, 10**7, 10**7 + 1, 2 * 10**7]
CANDIDATES = [1, 40, 3, 22, 8, 57, 30]


class Probe:
    """An engine whose steps are run by hand, so that pages can be read before they are freed."""

    def __init__(self, directory: Path, case: Case) -> None:
        self.config = toy_config(case.dialect, **case.changes)
        config = toy_engine_config(
            write_toy_model(directory / "toy", self.config), num_pages=60, max_num_batched_tokens=99
        )
        self._num_requests = 0
        self.engine = load_engine(config, VirtualClock())

    def request(self, items: list[int]) -> Request:
        self._num_requests += 1
        number = len(items)
        history = {"item_ids": items, "timestamps": TIMES[:number]}
        history |= {"actions": [item % 9 for item in items]}
        history |= {feature.name: [1] * number for feature in self.config.item_features}
        candidates = {"item_ids": CANDIDATES}
        candidates |= {feature.name: [2] * 7 for feature in self.config.item_features}
        context = {feature.name: 1 for feature in self.config.contextual_features}
        body = {"history": history, "candidates": candidates, "context": context}
        prepared = self.engine.processor.process(
            parse_request(body), f"request-{self._num_requests}", 0.0
        )
        return prepared.request

    def start(self, request: Request) -> SchedulerOutput:
        """The request's only step, not yet carried out."""
        self.engine.core.add_request(request)
        step = self.engine.core.scheduler.schedule(0.0)
        assert step is not None
        return step

    def finish(self, request: Request, step: SchedulerOutput) -> None:
        output = self.engine.runner.execute(step)
        assert self.engine.core.scheduler.update(step, output, 0.0) == [request]

    def kv(self, items: list[int]) -> torch.Tensor:
        """K and V of each final context row after a whole pass: [rows, numbers]."""
        request = self.request(items)
        step = self.start(request)
        self.finish(request, step)
        (scheduled,) = step.requests
        table = torch.from_numpy(scheduled.block_table)
        assert scheduled.num_rows == request.num_tokens
        parts = [
            part.flatten(1)
            for layer in range(self.config.num_layers)
            for part in self.engine.runner.arena.kv.gather(layer, table, request.num_tokens)
        ]
        return torch.cat(parts, dim=1)[: request.tokens.num_final]


def same_rows(first: torch.Tensor, second: torch.Tensor) -> list[bool]:
    """Of the rows that both have, which are equal but for rounding."""
    length = min(len(first), len(second))
    difference = (first[:length] - second[:length]).abs().amax(dim=1)
    flags: list[bool] = (difference < 1e-5).tolist()
    return flags


@every_case
def test_kv_of_a_beginning_is_that_of_the_longer_history_where_it_may_be_reused(
    tmp_path: Path, case: Case
) -> None:
    probe = Probe(tmp_path, case)
    shorter, longer = probe.kv(ITEMS[:8]), probe.kv(ITEMS)
    assert all(same_rows(shorter, longer)) == case.reuse


@every_case
def test_kv_of_a_row_depends_on_no_later_one_where_contexts_may_be_chunked(
    tmp_path: Path, case: Case
) -> None:
    probe = Probe(tmp_path, case)
    config = probe.config
    rows_before = config.num_contextual_tokens + config.tokens_per_event * (len(ITEMS) - 1)
    same = same_rows(probe.kv(ITEMS), probe.kv([*ITEMS[:-1], 55]))
    assert len(same) >= rows_before
    assert all(same[:rows_before]) == case.chunkable


@pytest.mark.parametrize("cut", range(1, 7))
@pytest.mark.parametrize("name", ["stu", "nvidia", "nvidia in groups", "open nvidia in groups"])
def test_scores_of_a_micro_batch_are_those_of_all_candidates_where_it_is_cut_at_a_unit(
    tmp_path: Path, name: str, cut: int
) -> None:
    """A step that scores the candidates behind the cut, as if the others had had their step."""
    case = CASES[name]
    probe = Probe(tmp_path, case)
    whole, part = probe.request(ITEMS), probe.request(ITEMS)
    probe.finish(whole, probe.start(whole))
    step = probe.start(part)
    (scheduled,) = step.requests
    task = scheduled.task
    assert isinstance(task, CandidateScoring)
    behind = CandidateScoring(task.row_index[cut:], task.features[cut:])
    cut_step = replace(step, requests=(replace(scheduled, task=behind),))
    got = probe.engine.runner.execute(cut_step).candidate_scores[part.request_id]
    probe.engine.core.scheduler.update(step, probe.engine.runner.execute(step), 0.0)
    assert whole.scores is not None
    same = np.abs(got - whole.scores[cut:]).max() < 1e-5
    assert same == (cut % case.unit == 0)


@pytest.mark.parametrize("dialect", TOY_CONFIGS)
def test_models_page_says_what_the_engine_obeys(tmp_path: Path, dialect: str) -> None:
    probe = Probe(tmp_path, Case(dialect, {}, True, True, 1))
    engine = probe.engine
    assert engine.served.capabilities == capabilities_of(engine.served.model_config)
    rules = step_rules(engine.served.model_config, engine.served.capabilities)
    assert engine.core.scheduler.rules == rules
