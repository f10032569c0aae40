"""Work that is recorded operator by operator, and replayed over the same memory, as graphs are."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from model_executor.step_graphs import Replay


class RecordedWork:
    """See `GraphCapture`. What Python decided when the work was recorded is decided for good.

    A replay writes to one place, and what replays before it wrote is NaN by then.
    """

    nbytes = 1000

    def __init__(self) -> None:
        self.replays: list[int] = []
        """Of each piece of work, in the order in which they were recorded."""
        self._results: list[Tensor] = []

    def capture(self, work: Callable[[], Tensor]) -> Replay:
        recorded = make_fx(work)()
        result: Tensor = recorded().clone()
        self._results.append(result)
        place = len(self.replays)
        self.replays.append(0)

        def replay() -> Tensor:
            self.replays[place] += 1
            for one in self._results:
                one.fill_(math.nan)
            result.copy_(recorded())
            return result

        return replay
