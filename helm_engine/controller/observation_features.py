"""The normalised vector of an observation, which a learned policy reads, in one kernel."""

from __future__ import annotations

from math import log2
from typing import Any

import numpy as np
from numba import njit

from helm_engine.controller.observation import HALF_SAMPLES, balance

_balance = njit(cache=True)(balance)


@njit(cache=True)
def features_of(fields: Any) -> Any:
    """`Observation.vector` of the fields in their order, a tuple of floats."""
    (
        _,
        hot_user_share,
        kv_hit_rate,
        emb_hit_rate,
        mean_history_tokens,
        slo_violation_rate,
        emb_fraction,
        p99_over_slo,
        kv_page_gain_ms,
        kv_page_loss_ms,
        emb_page_gain_ms,
        emb_page_loss_ms,
        arrival_rate,
        arrival_jump,
        arrival_jump_sigmas,
        foreground_bytes_per_s,
        load_busy,
        prefill_busy,
        score_busy,
        queue_delay_ms,
        refill_backlog,
        target_lag,
        age_s,
        num_requests,
        kv_samples,
        emb_samples,
        num_pages,
        _,
        _,
        _,
        _,
        slo_ms,
    ) = fields
    return np.array(
        (
            hot_user_share,
            kv_hit_rate,
            emb_hit_rate,
            min(1.0, _log(mean_history_tokens) / 16.0),
            slo_violation_rate,
            emb_fraction,
            min(4.0, p99_over_slo) / 4.0,
            _squashed(kv_page_gain_ms * num_pages / 1e3),
            _squashed(kv_page_loss_ms * num_pages / 1e3),
            _squashed(emb_page_gain_ms * num_pages / 1e3),
            _squashed(emb_page_loss_ms * num_pages / 1e3),
            _balance(kv_page_gain_ms, emb_page_loss_ms),
            _balance(emb_page_gain_ms, kv_page_loss_ms),
            min(1.0, _log(arrival_rate) / 16.0),
            max(-1.0, min(1.0, log2(max(arrival_jump, 1e-3)) / 3.0)),
            max(-1.0, min(1.0, arrival_jump_sigmas / 10.0)),
            min(1.0, _log(foreground_bytes_per_s) / 40.0),
            min(1.0, load_busy),
            min(1.0, prefill_busy),
            min(1.0, score_busy),
            min(4.0, queue_delay_ms / slo_ms) / 4.0,
            refill_backlog,
            target_lag,
            min(1.0, age_s / 10.0),
            _confidence(num_requests),
            _confidence(kv_samples),
            _confidence(emb_samples),
        ),
        dtype=np.float32,
    )


@njit(cache=True)
def _squashed(share: Any) -> Any:
    return share / (1.0 + share)


@njit(cache=True)
def _confidence(samples: Any) -> Any:
    return samples / (samples + HALF_SAMPLES)


@njit(cache=True)
def _log(rate: Any) -> Any:
    return log2(1.0 + rate)
