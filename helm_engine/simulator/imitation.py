"""Begins the training of an actor with a teacher's examples, before it learns from rewards."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import numpy as np
import torch
from stable_baselines3.common.policies import ActorCriticPolicy

from helm_engine.controller.base_policy import ACTIONS
from helm_engine.simulator.teacher import Examples

_BATCH = 512
_HELD_OUT_SHARE = 0.1


def imitate(
    policy: ActorCriticPolicy,
    examples: Examples,
    epochs: int,
    seed: int,
    say: Callable[[str], object],
) -> float:
    """Trains the actor to do what the examples say; the critic is left as it is.

    An action's examples count by the inverse root of their number: most of the time there is
    nothing to do, and a policy that never moves would be right most of the time.

    Args:
        policy: of stable-baselines3, with layers of tanh.
        examples: at least a hundred; the last tenth is held out.
        epochs: times that each example is seen.
        seed: of the order of the examples.
        say: gets a line for every ten epochs.

    Returns:
        Share of held-out examples in which the actor moves the way that the teacher does, or rests
        as it does.
    """
    kept = len(examples.actions) - int(len(examples.actions) * _HELD_OUT_SHARE)
    vectors, actions = torch.from_numpy(examples.vectors), torch.from_numpy(examples.actions)
    counts = torch.bincount(actions[:kept], minlength=len(ACTIONS)).float()
    weights = (counts.clamp(min=1.0) / counts.sum()) ** -0.5
    layers = policy.mlp_extractor.policy_net, policy.action_net
    optimizer = torch.optim.Adam(chain(*(one.parameters() for one in layers)), lr=1e-3)
    rng = np.random.default_rng(seed)
    agrees = 0.0
    for epoch in range(epochs):
        order = torch.from_numpy(rng.permutation(kept))
        for batch in order.split(_BATCH):
            scores = layers[1](layers[0](vectors[batch]))
            loss = torch.nn.functional.cross_entropy(scores, actions[batch], weight=weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            best = layers[1](layers[0](vectors[kept:])).argmax(dim=1)
        middle = len(ACTIONS) // 2
        agrees = float(((best - middle).sign() == (actions[kept:] - middle).sign()).float().mean())
        if (epoch + 1) % 10 == 0:
            say(f"imitation, epoch {epoch + 1}: loss {loss.item():.3f}, agreement {agrees:.3f}")
    return agrees
