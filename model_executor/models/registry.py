"""Models and their input assemblers by dialect: the one place that knows all of them."""

from __future__ import annotations

from model_executor.inputs.features import InputAssembler
from model_executor.inputs.nvidia import NvidiaInputs
from model_executor.inputs.research import ResearchInputs
from model_executor.inputs.sasrec import SASRecInputs
from model_executor.inputs.stu import StuInputs
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


def build_inputs(config: ModelConfig) -> InputAssembler:
    """What turns a request of this model into tokens."""
    if isinstance(config, ResearchConfig):
        return ResearchInputs()
    if isinstance(config, StuConfig):
        return StuInputs(config)
    if isinstance(config, NvidiaConfig):
        return NvidiaInputs(config)
    return SASRecInputs()
