"""The example of a deployment on Kubernetes: its schema, and what Ray Serve and we read in it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml  # type: ignore[import-untyped]

from tests.toy_models import toy_config, write_toy_model

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "deployment"
SCHEMA = yaml.safe_load(Path(__file__).with_name("rayservice_schema.yaml").read_text())
VALIDATOR = jsonschema_rs.validator_for(SCHEMA)


@pytest.fixture
def manifest() -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load((FOLDER / "rayservice.yaml").read_text())
    return read


@pytest.fixture
def serve_config(manifest: dict[str, Any]) -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    return read


def test_the_manifest_is_what_kuberay_takes(manifest: dict[str, Any]) -> None:
    VALIDATOR.validate(manifest)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda spec: spec.pop("rayClusterConfig"),
        lambda spec: spec.update(serveConfig=""),
        lambda spec: spec["rayClusterConfig"]["authOptions"].update(mode="maybe"),
        lambda spec: spec["rayClusterConfig"]["workerGroupSpecs"][0].pop("groupName"),
        lambda spec: spec["rayClusterConfig"]["workerGroupSpecs"][0].update(replicas="4"),
        lambda spec: spec["rayClusterConfig"]["headGroupSpec"]["rayStartParams"].update(x=0),
    ],
)
def test_the_schema_refuses_what_kuberay_refuses(
    manifest: dict[str, Any], spoil: Callable[[dict[str, Any]], object]
) -> None:
    spoilt = copy.deepcopy(manifest)
    spoil(spoilt["spec"])
    assert not VALIDATOR.is_valid(spoilt)


def test_ray_is_the_one_that_is_pinned(manifest: dict[str, Any]) -> None:
    version = manifest["spec"]["rayClusterConfig"]["rayVersion"]
    assert f"\nray=={version}\n" in (ROOT / "constraints.txt").read_text()
    assert f"FROM rayproject/ray:{version}-" in (FOLDER / "Dockerfile").read_text()


def test_workers_have_room_for_engines_and_fronts(
    manifest: dict[str, Any], serve_config: dict[str, Any]
) -> None:
    args = serve_config["applications"][0]["args"]
    (group,) = manifest["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    cores = int(container["resources"]["requests"]["cpu"])
    engines_each = cores // args["ray_cpus"]
    assert group["replicas"] * engines_each >= args["num_engines"]
    left = group["replicas"] * cores - args["num_engines"] * args["ray_cpus"]
    assert left >= args["num_fronts"]


def test_ray_serve_and_the_application_take_its_configuration(
    serve_config: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    from ray.serve.schema import ServeDeploySchema

    deployed = ServeDeploySchema.model_validate(serve_config).applications[0]
    assert deployed.import_path == "helm_engine.entrypoints.ray_application:application"
    from helm_engine.entrypoints.ray_application import application

    key = tmp_path / "user-key"
    key.write_text("sixteen bytes, or more")
    model = write_toy_model(tmp_path / "toy", toy_config())
    args = {**deployed.args, "model": str(model), "user_key_file": str(key)}
    fronts: Any = application(args)._bound_deployment
    engines = fronts.init_args[2]._bound_deployment
    assert (fronts.num_replicas, engines.num_replicas) == (args["num_fronts"], args["num_engines"])
    assert engines.ray_actor_options["num_cpus"] == args["ray_cpus"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "model: must be given"),
        ({"model": "m", "port": 80}, "port: is for the command line"),
        ({"model": "m", "num_engine": 2}, "num_engine: is no flag"),
        ({"model": "m", "hedge_ms": 2.0}, "hedge_ms: does not go with --ray"),
        ({"model": "m", "num_engines": "two"}, "num_engines: Input should be a valid integer"),
        ({"model": "m", "pool_bytes": "much"}, "pool_bytes: 'much' is not a size"),
    ],
)
def test_wrong_arguments_are_refused_by_name(args: dict[str, Any], message: str) -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    from helm_engine.entrypoints.ray_application import application

    with pytest.raises(ValueError, match=message):
        application(args)
