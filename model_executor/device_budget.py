"""How large a pool a device has room for: sizes only, all in bytes.

    total = | what the engine may take                          | left to others |
            | weights | the largest step's workspace |   pool   |                |

The share left to others also holds what no tensor shows: the driver's context, the kernels, and
what the allocator loses to fragments. (vLLM cuts a GPU's memory in the same way.)
"""

from __future__ import annotations

from dataclasses import dataclass

from model_executor.exceptions import DeviceMemoryError


def as_size(num_bytes: int) -> str:
    """Bytes as a person reads them."""
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if abs(num_bytes) >= 1 << shift:
            return f"{num_bytes / (1 << shift):.2f} {unit}"
    return f"{num_bytes} bytes"


@dataclass(frozen=True, slots=True)
class DeviceBudget:
    """The memory of a device before the engine takes any."""

    device: str
    total: int
    free: int
    utilization: float
    """Share of the total, above 0 and at most 1, that engines of this front may take."""
    num_engines: int = 1
    """Those that share it, evenly."""

    @property
    def share(self) -> int:
        """What one engine may take."""
        return int(self.total * self.utilization) // self.num_engines

    def check_free(self) -> None:
        """Checks that nobody else holds what the engine may take.

        Raises:
            DeviceMemoryError: somebody does.
        """
        if self.free >= self.share:
            return
        fitting = int(100 * self.num_engines * self.free / self.total) / 100
        raise DeviceMemoryError(
            f"gpu_memory_utilization: {self._asked()} is {as_size(self.share)}, and only "
            f"{as_size(self.free)} are free: other processes hold "
            f"{as_size(self.total - self.free)}; end them, or lower it to {fitting:g}"
        )

    def pool_bytes(self, weights: int, workspace: int, smallest_pool: int) -> int:
        """What is left for the pool.

        Args:
            weights: that stay on the device.
            workspace: what the largest step adds.
            smallest_pool: the least that the engine can work with.

        Raises:
            DeviceMemoryError: less than that.
        """
        pool = self.share - weights - workspace
        if pool >= smallest_pool:
            return pool
        raise DeviceMemoryError(
            f"gpu_memory_utilization: {self._asked()} is {as_size(self.share)}, and "
            f"{as_size(weights + workspace + smallest_pool)} are needed: {as_size(weights)} of "
            f"weights, {as_size(workspace)} for the largest step, {as_size(smallest_pool)} for the "
            f"smallest pool ({as_size(self.free)} were free); lower max_num_batched_tokens, "
            "max_num_seqs or max_retrieval_matrix_bytes, or raise gpu_memory_utilization"
        )

    def _asked(self) -> str:
        asked = f"{self.utilization:g} of the {as_size(self.total)} of {self.device}"
        return asked if self.num_engines == 1 else f"{asked} for each of {self.num_engines} engines"
