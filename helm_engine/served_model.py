"""What a front knows of the engine that it serves; light: no tensors, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from block_manager.pool_layout import PoolLayout
from helm_engine.config import EngineConfig
from helm_engine.input_processor import InputProcessor
from model_executor.capabilities import Capabilities
from model_executor.cost_profile import CostProfile
from model_executor.device_memory import DeviceMemory
from model_executor.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One loaded model and the engine around it; sent by the engine core when it is ready."""

    config: EngineConfig
    model_config: ModelConfig
    version: str
    """Digest of weights and tables."""
    capabilities: Capabilities
    layout: PoolLayout
    memory: DeviceMemory
    activation_bound: int
    """Bytes that a step adds to what stays on the device, at most."""
    can_retrieve: bool
    cost_profile: CostProfile | None = None
    """What work costs on its device, where that was measured."""
    workspace: int | None = None
    """Bytes that the largest steps added when they were measured at start; None = they were not."""

    @property
    def name(self) -> str:
        """The name under which the model is served."""
        return self.config.model_name

    def input_processor(self, user_key: bytes) -> InputProcessor:
        """What turns requests for this model into engine requests.

        Args:
            user_key: keys the hashes of users; fronts of one engine must share it.
        """
        return InputProcessor(
            model=self.model_config,
            capabilities=self.capabilities,
            model_name=self.name,
            model_version=self.version,
            limits=self.config.limits,
            block_tokens=self.layout.block_tokens,
            max_step_tokens=self.config.scheduler.max_num_batched_tokens,
            can_retrieve=self.can_retrieve,
            user_key=user_key,
        )
