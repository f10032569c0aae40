from __future__ import annotations

import pytest
import torch

from model_executor.devices import select_device


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """As many GPUs as a test asks for."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)


@pytest.mark.parametrize("gpus", [4], indirect=True)
@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("name", "place", "num_engines", "device"),
    [
        ("cpu", 3, 9, "cpu"),
        ("cuda", 0, 1, "cuda:0"),
        ("cuda", 3, 4, "cuda:3"),
        ("auto", 2, 3, "cuda:2"),
        ("cuda:2", 0, 1, "cuda:2"),
        ("cuda:2", 7, 9, "cuda:2"),
    ],
)
def test_each_engine_has_a_gpu_unless_one_device_is_named(
    name: str, place: int, num_engines: int, device: str
) -> None:
    assert select_device(name, place, num_engines) == torch.device(device)


@pytest.mark.parametrize("gpus", [0], indirect=True)
@pytest.mark.usefixtures("gpus")
def test_auto_without_a_gpu_is_the_processor() -> None:
    assert select_device("auto", 2, 3) == torch.device("cpu")


@pytest.mark.parametrize(
    ("gpus", "name", "num_engines", "message"),
    [
        (2, "cuda", 3, "3 engines want a GPU each and 2 GPUs were found: lower num_engines"),
        (1, "auto", 2, "2 engines want a GPU each and 1 GPU was found: lower num_engines"),
        (0, "cuda", 1, r"'cuda' is not there \(no GPUs were found\)"),
        (2, "cuda:2", 1, r"'cuda:2' is not there \(2 GPUs were found\)"),
        (2, "cuda:-1", 1, "'cuda:-1' is none of cpu, cuda, cuda:N and auto"),
        (2, "cuda:", 1, "'cuda:' is none of"),
        (2, "mps", 1, "'mps' is none of"),
        (2, "cpu:0", 1, "'cpu:0' is none of"),
    ],
    indirect=["gpus"],
)
@pytest.mark.usefixtures("gpus")
def test_what_is_not_there_is_refused(name: str, num_engines: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"^device: {message}"):
        select_device(name, 0, num_engines)
