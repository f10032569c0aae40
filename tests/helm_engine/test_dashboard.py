"""The Grafana dashboard asks for metrics that the server has, all of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.running_server import BUNDLED_MODEL, REPOSITORY, running_server

DASHBOARD = REPOSITORY / "examples" / "grafana" / "helm-engine.json"


def _expressions(dashboard: dict[str, Any]) -> list[str]:
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return panels + [variable["query"] for variable in dashboard["templating"]["list"]]


@pytest.fixture(scope="module")
def exposed() -> str:
    """What a server exposes that has answered once and refused once."""
    with running_server(BUNDLED_MODEL) as server:
        server.post({"user": "u", "history": {"item_ids": [1, 2], "timestamps": [1, 2]}})
        server.post({})
        return httpx.get(server.address + "/metrics").text


def test_every_metric_of_the_dashboard_is_exposed_and_the_other_way_round(exposed: str) -> None:
    known, families = {}, set()
    for family in text_string_to_metric_families(exposed):
        for sample in family.samples:
            known[sample.name] = set(sample.labels)
            if family.name.startswith("helm:") and not sample.name.endswith("_created"):
                families.add(family.name)
    asked = " ".join(_expressions(json.loads(DASHBOARD.read_text(encoding="utf-8"))))
    names = set(re.findall(r"\b(?:helm:|process_)\w+", asked))
    assert names - set(known) == set()
    assert [family for family in families if family not in asked] == []


def test_its_labels_are_those_of_the_metrics(exposed: str) -> None:
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(exposed):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    for expression in _expressions(json.loads(DASHBOARD.read_text(encoding="utf-8"))):
        for name, selected in re.findall(r"(helm:\w+)\{(\w+)[=~!]", expression):
            assert selected in labels[name], expression
        for grouped, name in re.findall(r"by \((\w+)\) \(rate\((helm:\w+)", expression):
            assert grouped in labels[name], expression


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(Path(DASHBOARD).read_text(encoding="utf-8"))["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
