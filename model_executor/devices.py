"""Which device an engine computes on, by what the operator said."""

from __future__ import annotations

import torch


def select_device(name: str, place: int = 0, num_engines: int = 1) -> torch.device:
    """The device of one of the engines that a front runs.

    Args:
        name: `cpu`; `cuda`, a GPU for each engine; `cuda:N`, this one GPU for all of them; `auto`,
            `cuda` where there are GPUs and else `cpu`.
        place: which engine, from 0 on.
        num_engines: how many.

    Raises:
        ValueError: no device has this name, it is not there, or there are fewer GPUs than engines.
    """
    kind, _, number = name.partition(":")
    is_one_gpu = kind == "cuda" and number.isdecimal()
    if name not in ("cpu", "cuda", "auto") and not is_one_gpu:
        raise ValueError(f"device: {name!r} is none of cpu, cuda, cuda:N and auto")
    num_gpus = 0 if name == "cpu" else torch.cuda.device_count()
    if name == "cpu" or (name == "auto" and not num_gpus):
        return torch.device("cpu")
    if is_one_gpu:
        if int(number) >= num_gpus:
            raise ValueError(f"device: {name!r} is not there ({_gpus(num_gpus)} found)")
        return torch.device("cuda", int(number))
    if num_engines > num_gpus:
        if not num_gpus:
            raise ValueError(f"device: {name!r} is not there (no GPUs were found)")
        raise ValueError(
            f"device: {num_engines} engines want a GPU each and {_gpus(num_gpus)} found: "
            "lower num_engines, or name one device for all of them (cuda:0, cpu)"
        )
    return torch.device("cuda", place)


def _gpus(number: int) -> str:
    return "1 GPU was" if number == 1 else f"{number or 'no'} GPUs were"
