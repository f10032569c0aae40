"""A model that is served, and every answer of which is held against its slow reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from helm_engine.config import ExecutorConfig
from helm_engine.protocol import Recommendation, Usage, parse_request
from helm_engine.recommender import Recommender
from helm_engine.request import Request
from helm_engine.scheduler import Scheduler
from model_executor.checkpoint import save_model
from model_executor.model_config import ModelConfig, RankingConfig
from model_executor.models.registry import build_model
from model_executor.models.sequence_model import SequenceModel
from tests.reference import Reference, load_reference
from tests.reference.formulas import Array
from tests.toy_models import random_tables, randomise, toy_engine_config

TOLERANCE = 1e-5
BREAKS = 1e-3
"""What reuse that is refused would do to a score, at least."""

ATTENTION_GAIN = 2.0


def largest_error(got: Array, want: Array) -> float:
    """Largest |a - b| / max(1, |a|); NaN if a score is not a number."""
    assert got.shape == want.shape
    return float(np.max(np.abs(got - want) / np.maximum(1.0, np.abs(want))))


DRAWS = 16
"""One draw of roundings may happen to cancel: those of the model in `test_exactness_rounding.py`
move scores by 1e-6 to 3e-5 in nine of ten draws. The most of some says what a model makes of them.
"""
ROUNDINGS = 2
"""A pass also rounds what it computes between weights. Over a thousand random models its error was
at most 1.05 times the most of `DRAWS`."""


@dataclass(frozen=True)
class Served:
    """An engine over few pages, freed ones poisoned, with the reference of its model."""

    directory: Path
    config: ModelConfig
    recommender: Recommender
    reference: Reference

    @property
    def scheduler(self) -> Scheduler:
        return self.recommender.engine.core.scheduler

    def ask(self, body: dict[str, Any]) -> Usage:
        """Asks alone; the scores must be exact."""
        return self.ask_all([body])[0]

    def ask_all(self, bodies: Sequence[dict[str, Any]]) -> list[Usage]:
        """Asks together; the scores must be exact."""
        answers = self.recommender.recommend_batch(bodies)
        self.scheduler.check_integrity()
        for body, answer in zip(bodies, answers, strict=True):
            error = largest_error(self._scores(body, answer), self.reference.answer(body))
            assert error <= TOLERANCE or error <= ROUNDINGS * self.shaken(body), (error, body)
        return [answer.usage for answer in answers]

    def shaken(self, body: dict[str, Any]) -> float:
        """How far scores move at most when the weights do by a digit of fp32, up or down.

        Among thousands of random models there are some that multiply their rounding by hundreds.
        """
        digit, want = float(np.finfo(np.float32).eps), self.reference.answer(body)
        return max(
            largest_error(load_reference(self.directory, digit, seed).answer(body), want)
            for seed in range(DRAWS)
        )

    def _scores(self, body: dict[str, Any], answer: Recommendation) -> Array:
        """Scores by candidate, or by item where none were sent: [C, tasks]."""
        config, candidates = self.config, body["candidates"]
        number = config.num_items if candidates is None else len(candidates["item_ids"])
        assert len(answer.data) == number
        scores = np.full((number, max(1, len(config.task_list))), np.nan)
        for item in answer.data:
            place = item.index
            if candidates is None:
                place = item.item_id - config.first_item_id
            else:
                assert item.item_id == candidates["item_ids"][place]
            if isinstance(config, RankingConfig):
                assert item.task_scores is not None
                scores[place] = [item.task_scores[task.name] for task in config.tasks]
                assert item.score == item.task_scores[config.rank_by or config.tasks[0].name]
            else:
                scores[place] = item.score
        return scores

    def prepare(self, body: dict[str, Any], request_id: str) -> Request:
        """The engine's own request of a body, to be tampered with."""
        processor = self.recommender.engine.processor
        return processor.process(parse_request(body), request_id, now=0.0).request

    def error_of(self, request: Request, body: dict[str, Any]) -> float:
        """Runs a request that was made of this body; how far its scores are off.

        The body's candidates differ, so that the engine has left them where they were.
        """
        core = self.recommender.engine.core
        core.add_request(request)
        core.run_until_idle()
        assert request.error is None and request.scores is not None
        return largest_error(request.scores.astype(np.float64), self.reference.answer(body))


def serve(
    directory: Path, config: ModelConfig, seed: int = 0, attention: str = "auto", **engine: Any
) -> Served:
    """Writes a toy model with random weights and loads it."""
    path = directory / "toy"
    model = build_model(config)
    randomise(model, seed)
    _raise_attention(model)
    save_model(path, model, random_tables(config, seed))
    engine_config = replace(
        toy_engine_config(path, **{"num_pages": 40} | engine),
        executor=ExecutorConfig(attention_backend=attention),
    )
    recommender = Recommender.from_config(engine_config)
    return Served(path, config, recommender, load_reference(path))


def _raise_attention(model: SequenceModel) -> None:
    """Makes what rows read of others as large as what they are, so that no mistake is too small.

    Scores of toy models would otherwise follow some rows in the sixth digit alone.
    """
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(".uvqk"):
                weight.mul_(ATTENTION_GAIN)
