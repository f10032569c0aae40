"""Begins the training of an actor with a teacher's examples, before it learns from rewards.

What is learned is how far the boundary should move, as a mean: the teacher knows the future and the
same observation is followed by different ones. A classifier of actions would say "stay" wherever
that is the likeliest single answer, though most of the likely ones lie to one side; it moved too
little and too late.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from stable_baselines3.common.policies import ActorCriticPolicy

from helm_engine.controller.base_policy import ACTIONS
from helm_engine.simulator.teacher import Examples

_BATCH = 512
_HELD_OUT_SHARE = 0.1
_LEARNING_RATE = 1e-3
_GAIN = 4.0
"""Times the mean that was learned: what is uncertain averages out to little, and a little in the
right direction at each query is as far as the teacher would go by the next but one."""
_MOVE_COST = 0.5
"""Of an action of 1, in what it would win if it were right by that much. A teacher's move that is
not certain to come would be begun and taken back otherwise, pages going both ways."""
_SHARPNESS = 16.0
"""Of the actor's choice, which PPO explores with: neighbours of the best action, hardly others."""


def imitate(
    policy: ActorCriticPolicy,
    examples: Examples,
    epochs: int,
    seed: int,
    say: Callable[[str], object],
) -> float:
    """Trains the actor to go where the teacher would; the critic is left as it is.

    One output, the rate that leads there, is learned by least squares. The actor's scores are made
    of it so that the action nearest to `_GAIN` times that rate, less `_MOVE_COST` in the direction
    of 0, has the highest: for an action a and a rate y, a y - a^2 / 2 is (y^2 - (a - y)^2) / 2.

    Args:
        policy: of stable-baselines3, with layers of tanh.
        examples: at least a hundred; the last tenth is held out.
        epochs: times that each example is seen.
        seed: of the order of the examples.
        say: gets a line for every ten epochs.

    Returns:
        Share of the variance of the held-out examples' rates that the actor explains.
    """
    kept = len(examples.rates) - int(len(examples.rates) * _HELD_OUT_SHARE)
    vectors, rates = torch.from_numpy(examples.vectors), torch.from_numpy(examples.rates)
    hidden = policy.mlp_extractor.policy_net
    actions = policy.action_net
    assert isinstance(actions, torch.nn.Linear)
    head = torch.nn.Linear(actions.in_features, 1)
    optimizer = torch.optim.Adam([*hidden.parameters(), *head.parameters()], lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    rng = np.random.default_rng(seed)
    explained = 0.0
    for epoch in range(epochs):
        order = torch.from_numpy(rng.permutation(kept))
        for batch in order.split(_BATCH):
            loss = ((head(hidden(vectors[batch]))[:, 0] - rates[batch]) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        with torch.no_grad():
            missed = (head(hidden(vectors[kept:]))[:, 0] - rates[kept:]).square().mean()
        explained = 1.0 - float(missed / rates[kept:].var())
        if (epoch + 1) % 10 == 0:
            say(f"imitation, epoch {epoch + 1}: loss {loss.item():.3f}, explains {explained:.3f}")
    _score_by_distance(actions, head)
    return explained


@torch.no_grad()
def _score_by_distance(action_net: torch.nn.Linear, head: torch.nn.Linear) -> None:
    """Makes the scores those of the actions' distances from what the head says."""
    actions = torch.tensor(ACTIONS)
    action_net.weight.copy_(_SHARPNESS * _GAIN * actions[:, None] * head.weight)
    costs = actions.square() / 2.0 + _MOVE_COST * actions.abs()
    action_net.bias.copy_(_SHARPNESS * (_GAIN * actions * head.bias - costs))
