"""Input assemblers by dialect; without torch, so that a front can stay light."""

from __future__ import annotations

from model_executor.inputs.features import InputAssembler
from model_executor.inputs.nvidia import NvidiaInputs
from model_executor.inputs.research import ResearchInputs
from model_executor.inputs.sasrec import SASRecInputs
from model_executor.inputs.stu import StuInputs
from model_executor.model_config import ModelConfig, NvidiaConfig, ResearchConfig, StuConfig


def build_inputs(config: ModelConfig) -> InputAssembler:
    """What turns a request of this model into tokens."""
    if isinstance(config, ResearchConfig):
        return ResearchInputs()
    if isinstance(config, StuConfig):
        return StuInputs(config)
    if isinstance(config, NvidiaConfig):
        return NvidiaInputs(config)
    return SASRecInputs()
