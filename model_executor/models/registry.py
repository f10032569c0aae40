"""Models by dialect; `model_executor/inputs/registry.py` has what turns requests into tokens."""

from __future__ import annotations

from model_executor.model_config import (
    ModelConfig,
    NvidiaConfig,
    ResearchConfig,
    StuConfig,
)
from model_executor.models.nvidia import NvidiaHSTU
from model_executor.models.research import ResearchHSTU
from model_executor.models.sasrec import SASRec
from model_executor.models.sequence_model import SequenceModel
from model_executor.models.stu import StuHSTU


def build_model(config: ModelConfig) -> SequenceModel:
    """The module of a config, its weights not yet set."""
    if isinstance(config, ResearchConfig):
        return ResearchHSTU(config)
    if isinstance(config, StuConfig):
        return StuHSTU(config)
    if isinstance(config, NvidiaConfig):
        return NvidiaHSTU(config)
    return SASRec(config)
