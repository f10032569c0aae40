"""The frozen policy: what its file says is what it does, and a bad file is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from safetensors.numpy import save_file

from helm_engine.controller.base_policy import ACTIONS, BasePolicy, load_base_policy
from helm_engine.controller.observation import FEATURES, Observation
from helm_engine.controller.registry import make_controller

CALM = Observation(num_requests=500.0, slo_ms=80.0, emb_fraction=0.5, num_pages=1000)


def tensors(width: int = 8) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    sizes = [len(FEATURES), width, width, len(ACTIONS)]
    made = {}
    for number, (inputs, outputs) in enumerate(pairwise(sizes)):
        made[f"layer{number}.weight"] = rng.standard_normal((inputs, outputs)).astype(np.float32)
        made[f"layer{number}.bias"] = rng.standard_normal(outputs).astype(np.float32)
    return made


METADATA = {"features": json.dumps(FEATURES), "actions": json.dumps(ACTIONS)}


@given(st.floats(0.0, 1.0), st.floats(0.0, 8.0), st.floats(0.0, 1e4), st.floats(0.0, 1.0))
def test_it_computes_what_torch_computes(hot: float, p99: float, rate: float, emb: float) -> None:
    made = tensors()
    policy = BasePolicy(
        [made[f"layer{n}.weight"] for n in range(3)], [made[f"layer{n}.bias"] for n in range(3)]
    )
    seen = replace(CALM, hot_user_share=hot, p99_over_slo=p99, arrival_rate=rate, emb_fraction=emb)
    layers = []
    for number in range(3):
        weight = made[f"layer{number}.weight"]
        layer = torch.nn.Linear(*weight.shape)
        layer.weight.data = torch.from_numpy(weight.T.copy())
        layer.bias.data = torch.from_numpy(made[f"layer{number}.bias"])
        layers += [layer, torch.nn.Tanh()]
    expected = torch.nn.Sequential(*layers[:-1])(torch.from_numpy(seen.vector())).detach().numpy()
    np.testing.assert_allclose(policy.scores(seen.vector()), expected, rtol=1e-4, atol=1e-4)
    assert policy.rate(seen) in ACTIONS


def test_a_file_says_which_policy_it_is(tmp_path: Path) -> None:
    path = tmp_path / "policy.safetensors"
    save_file(tensors(), path, metadata=METADATA)
    made = tensors()
    policy = load_base_policy(path)
    same = BasePolicy(
        [made[f"layer{n}.weight"] for n in range(3)], [made[f"layer{n}.bias"] for n in range(3)]
    )
    assert policy.scores(CALM.vector()).tolist() == same.scores(CALM.vector()).tolist()


def damaged(path: Path) -> None:
    path.write_bytes(b"no tensors at all")


def other_features(path: Path) -> None:
    save_file(tensors(), path, metadata={**METADATA, "features": '["hot_user_share"]'})


def no_number(path: Path) -> None:
    made = tensors()
    made["layer1.weight"][0, 0] = np.nan
    save_file(made, path, metadata=METADATA)


def other_shape(path: Path) -> None:
    made = tensors()
    made["layer2.bias"] = made["layer2.bias"][:-1]
    save_file(made, path, metadata=METADATA)


def a_layer_less(path: Path) -> None:
    made = tensors()
    del made["layer2.weight"]
    save_file(made, path, metadata=METADATA)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: None, "cannot be read"),
        (damaged, "cannot be read"),
        (a_layer_less, "cannot be read"),
        (other_features, "trained for other features"),
        (no_number, "layer 1: holds what is not a number"),
        (other_shape, r"layer 2: .* are not \(8, 7\)"),
    ],
)
def test_a_bad_file_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Path], None],
    message: str,
) -> None:
    path = tmp_path / "policy.safetensors"
    spoil(path)
    with pytest.raises(ValueError, match=message):
        load_base_policy(path)
    # An engine serves on with the split as it is, and every decision says why.
    name = "helm_engine.controller.base_policy.load_base_policy"
    monkeypatch.setattr(name, lambda: load_base_policy(path))
    controller = make_controller("helm")
    assert controller.decide(1.0, 0.37, lambda now: replace(CALM, now=now)) == 0.37
    assert controller.latest is not None
    assert controller.latest.held is not None
    assert str(path) in controller.latest.held


def test_the_shipped_policy_is_readable_and_says_how_it_was_trained() -> None:
    policy = load_base_policy()
    assert np.isfinite(policy.scores(CALM.vector())).all()
    controller = make_controller("helm")
    controller.decide(1.0, 0.5, lambda now: replace(CALM, now=now))
    assert controller.latest is not None
    assert controller.latest.held is None
    assert controller.latest.parts["base"] in ACTIONS


def test_layers_are_added_by_name() -> None:
    def parts(name: str) -> set[str]:
        controller = make_controller(name)
        controller.decide(1.0, 0.5, lambda now: replace(CALM, now=now))
        assert controller.latest is not None
        return set(controller.latest.parts)

    assert parts("helm") == {"base"}
    assert parts("helm+residual") == {"base", "residual"}
    assert parts("marginal+recovery") == {"base", "recovery"}
    assert parts("helm+residual+recovery") == {"base", "residual", "recovery"}
    for wrong in ("helm+base", "helm+recovery+residual", "helm-residual", "helm+"):
        with pytest.raises(ValueError, match=r"unknown \(known"):
            make_controller(wrong)
