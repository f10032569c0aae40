"""Trains the base policy: a teacher's examples, then PPO, over randomised workloads.

PPO is Schulman et al. 2017 (arXiv 1707.06347) as Raffin et al. 2021 (stable-baselines3) have it.
The stream of requests never ends, so the end of a trace is a truncation, whose value is
bootstrapped.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from math import exp
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import SubprocVecEnv

from helm_engine.controller.base_policy import ACTIONS
from helm_engine.controller.controller_config import ControllerConfig
from helm_engine.controller.observation import FEATURES, WORTH_FEATURES
from helm_engine.simulator.environment import AllocationEnvironment, Reward
from helm_engine.simulator.imitation import imitate
from helm_engine.simulator.random_workloads import EpisodeDrawer
from helm_engine.simulator.teacher import Examples, gather_examples

DISCOUNT_S = 60.0
"""Seconds after which a reward counts 1 / e."""


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """What is trained, for how long, and from which seed."""

    seed: int = 1
    scale: int = 16
    max_requests: int = 4_000_000
    """Simulated requests after which training ends."""
    max_minutes: float = 60.0
    """Or minutes."""
    processes: int = 6
    """More than processors: they wait for each other at each query."""
    episode_s: float = 420.0
    rollout: int = 256
    """Queries of each process between two updates."""
    teacher_episodes: int = 120
    """Whose examples training begins with; 0 = it begins with a policy that knows nothing."""
    imitation_epochs: int = 40
    critic_updates: int = 6
    """Updates that only the critic learns from, before the actor may leave its teacher."""
    learning_rate: float = 1e-4
    entropy_weight: float = 0.002
    width: int = 64
    """Of both hidden layers."""
    reward: Reward = field(default_factory=Reward)
    control: ControllerConfig = field(default_factory=ControllerConfig)

    @property
    def discount(self) -> float:
        """Of one control period."""
        return exp(-self.control.period_s / DISCOUNT_S)


class _Progress(BaseCallback):
    """Ends training at its limits, writes a line for each update, and keeps checkpoints."""

    def __init__(
        self, config: TrainingConfig, directory: Path, say: Callable[[str], object]
    ) -> None:
        super().__init__()
        self._config = config
        self._directory = directory
        self._say = say
        self._began = time.monotonic()
        self._terms: list[dict[str, float]] = []
        self._rewards: list[float] = []
        self.curve: list[dict[str, float]] = []

    @property
    def num_requests(self) -> int:
        """Simulated by all processes."""
        counts: list[int] = self.training_env.get_attr("num_requests")
        return sum(counts)

    def _on_step(self) -> bool:
        self._rewards += self.locals["rewards"].tolist()
        self._terms += [info["terms"] for info in self.locals["infos"] if info["terms"]]
        return True

    def _on_rollout_end(self) -> None:
        minutes = (time.monotonic() - self._began) / 60.0
        line = {
            "queries": float(self.num_timesteps),
            "requests": float(self.num_requests),
            "minutes": minutes,
            "reward": float(np.mean(self._rewards)),
        }
        for name in ("service", "violations", "delay"):
            line[name] = float(np.mean([terms[name] for terms in self._terms]))
        self.curve.append(line)
        self._rewards, self._terms = [], []
        self._say(", ".join(f"{name} {value:.4g}" for name, value in line.items()))
        checkpoint = self._directory / "checkpoint.safetensors"
        save_policy(self.model.policy, checkpoint, self._config, line)
        (self._directory / "curve.json").write_text(json.dumps(self.curve, indent=1) + "\n")

    def is_over(self) -> bool:
        """Whether a limit is reached."""
        last = self.curve[-1]
        config = self._config
        return last["requests"] >= config.max_requests or last["minutes"] >= config.max_minutes


def train(
    config: TrainingConfig,
    directory: Path,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Trains a policy and writes `policy.safetensors`, `curve.json` and checkpoints.

    Args:
        config: what to do.
        directory: where files go; made if it is not there.
        say: gets a line for each update.

    Returns:
        The configuration and the last line of the curve.

    Raises:
        OSError: a file cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "curve.json").write_text("[]\n")  # Fails now rather than after an hour.
    torch.set_num_threads(1)
    makers: list[Callable[[], gymnasium.Env[Any, Any]]] = [
        partial(_make_environment, config) for _ in range(config.processes)
    ]
    environments = SubprocVecEnv(makers, start_method="spawn")
    model = PPO(
        "MlpPolicy",
        environments,
        learning_rate=config.learning_rate,
        n_steps=config.rollout,
        batch_size=min(512, config.rollout * config.processes),
        n_epochs=6,
        clip_range=0.1,
        target_kl=0.02,
        gamma=config.discount,
        gae_lambda=0.95,
        ent_coef=config.entropy_weight,
        policy_kwargs={"net_arch": {"pi": [config.width] * 2, "vf": [config.width] * 2}},
        seed=config.seed,
        device="cpu",
    )
    # PPO's own seeds are the seed and those after it, which the next seed would share.
    environments.seed(config.seed * 1000)
    actor = [model.policy.mlp_extractor.policy_net, model.policy.action_net]
    try:
        if config.teacher_episodes:
            _learn_from_teacher(model.policy, config, directory, say)
        progress = _Progress(config, directory, say)  # Its minutes begin here.
        updates = 0
        while not updates or not progress.is_over():
            for part in actor:
                part.requires_grad_(not config.teacher_episodes or updates >= config.critic_updates)
            length = config.rollout * config.processes
            model.learn(length, progress, reset_num_timesteps=not updates)
            updates += 1
    finally:
        environments.close()
    last = progress.curve[-1]
    save_policy(model.policy, directory / "policy.safetensors", config, last)
    return {"config": asdict(config), "last": last}


def _learn_from_teacher(
    policy: ActorCriticPolicy,
    config: TrainingConfig,
    directory: Path,
    say: Callable[[str], object],
) -> None:
    """A third of the episodes the teacher drives, the others who has learned from that third."""
    path = directory / "imitation.safetensors"
    seeds = [config.seed * 1_000_000 + number for number in range(config.teacher_episodes)]
    first = -(-len(seeds) // 3)
    examples: Examples | None = None
    for some, pupil, driver in ((seeds[:first], None, "teacher"), (seeds[first:], path, "pupil")):
        if not some:
            continue  # Of a single episode.
        say(f"{len(some)} episodes, driven by the {driver}")
        more = gather_examples(some, _drawer(config), os.cpu_count() or 1, pupil)
        examples = more if examples is None else examples.joined(more)
        imitate(policy, examples, config.imitation_epochs, config.seed, say)
        save_policy(policy, path, config, {})


def _make_environment(config: TrainingConfig) -> Monitor[Any, Any]:
    torch.set_num_threads(1)
    return Monitor(AllocationEnvironment(_drawer(config), config.reward))


def _drawer(config: TrainingConfig) -> EpisodeDrawer:
    return EpisodeDrawer(config.scale, config.episode_s, config.control)


def save_policy(
    policy: torch.nn.Module, path: Path, config: TrainingConfig, progress: dict[str, float]
) -> None:
    """Writes the actor as `base_policy` reads it, with how it was trained in its metadata."""
    layers = [
        (name, layer)
        for name, layer in policy.named_modules()
        if isinstance(layer, torch.nn.Linear) and ("policy_net" in name or name == "action_net")
    ]
    tensors: dict[str, npt.NDArray[np.float32]] = {}
    for number, (_, layer) in enumerate(layers):
        weight, bias = layer.weight.detach().numpy().T.copy(), layer.bias.detach().numpy()
        if not number:
            # Training's engines do not tell what a page is worth, so these weights are what they
            # were drawn as; an engine in service may tell it.
            weight[[FEATURES.index(name) for name in WORTH_FEATURES]] = 0.0
        tensors[f"layer{number}.weight"] = weight
        tensors[f"layer{number}.bias"] = np.ascontiguousarray(bias)
    metadata = {
        "features": json.dumps(FEATURES),
        "actions": json.dumps(ACTIONS),
        "training": json.dumps({"config": asdict(config), "progress": progress}, default=str),
    }
    # By ourselves, since a failed write of the library is not an `OSError`.
    path.write_bytes(save(tensors, metadata))
