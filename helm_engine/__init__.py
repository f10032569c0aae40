"""HELM Engine: serving for generative recommenders out of one paged memory pool."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helm_engine.version import __version__

if TYPE_CHECKING:
    from helm_engine.recommender import Recommender

__all__ = ["Recommender", "__version__"]

_ROOMS = ("block_manager", "model_executor", "router")


def _refuse_foreign_rooms() -> None:
    """Our sibling packages have generic names; a foreign one of that name would break us later.

    Raises:
        ImportError: names the package and where it was found.
    """
    home = Path(__file__).resolve().parent.parent
    for name in _ROOMS:
        spec = importlib.util.find_spec(name)
        origin = spec.origin if spec is not None else None
        if origin is None or Path(origin).resolve().parent.parent != home:
            raise ImportError(
                f"helm_engine needs its own package {name!r} beside it in {home}, "
                f"but Python finds {origin or 'none'}; remove or rename the other one"
            )


_refuse_foreign_rooms()


def __getattr__(name: str) -> Any:
    # Loaded on first use: the request schema must stay importable without torch.
    if name == "Recommender":
        from helm_engine.recommender import Recommender

        return Recommender
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
