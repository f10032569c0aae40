"""What an operator decides, one frozen dataclass for each room it concerns."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from block_manager.pool_layout import PoolConfig
from block_manager.refill import RefillConfig
from helm_engine.controller.controller_config import ControllerConfig
from helm_engine.controller.registry import check_controller
from model_executor.redis_address import RedisAddress, parse_redis_url

DTYPES = ("float32", "bfloat16")
ROW_DTYPES = ("auto", "int8", "fp8")
KV_CACHE_DTYPES = ("auto", "fp8")
GPU_MEMORY_UTILIZATION = 0.9
"""Of an engine whose pool's size was not said."""


def _require_at_least(name: str, value: int, limit: int) -> None:
    if value < limit:
        raise ValueError(f"{name}: must be at least {limit}, not {value}")


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """How requests share steps."""

    max_num_batched_tokens: int = 2048
    """History rows and candidates of one step together; bounds activations and staging."""
    max_num_seqs: int = 64
    """Requests that run at once."""
    max_num_waiting: int = 1024
    """Requests that may wait beyond those that run; further ones are refused (429). More than can
    be answered within a deadline only make answers late."""
    max_pages_per_step: int | None = None
    """Pages that may change hands between two steps; None = a 64th of the pool."""
    patience_ms: float = 1000.0
    """A request without a deadline is due this long after it came, so that those with deadlines
    cannot starve it; it never expires."""

    def __post_init__(self) -> None:
        """Checks each value.

        Raises:
            ValueError: names the field and its limit.
        """
        # What one step must hold at least depends on the model: see `StepRules.min_tokens`.
        _require_at_least("max_num_batched_tokens", self.max_num_batched_tokens, 1)
        _require_at_least("max_num_seqs", self.max_num_seqs, 1)
        _require_at_least("max_num_waiting", self.max_num_waiting, 1)
        if self.max_pages_per_step is not None:
            _require_at_least("max_pages_per_step", self.max_pages_per_step, 1)
        if not self.patience_ms >= 0.0:
            raise ValueError(f"patience_ms: must be at least 0, not {self.patience_ms}")

    @property
    def max_num_held(self) -> int:
        """Requests that may run and wait together."""
        return self.max_num_seqs + self.max_num_waiting


@dataclass(frozen=True, slots=True)
class ExecutorConfig:
    """Where and how steps are carried out."""

    device: str = "cpu"
    """`cpu`; `cuda`: a GPU for each engine of the front; `cuda:1`: this one GPU for all of them;
    `auto`: GPUs where there are any."""
    place: int = 0
    """Which of the front's engines this is, from 0 on."""
    num_engines: int = 1
    """How many there are."""
    dtype: str = "float32"
    """Of weights, rows, K and V on the device: `float32`, or `bfloat16`, which is faster where the
    processor knows it and rounds scores (docs/benchmarks.md has the error)."""
    row_dtype: str = "auto"
    """Of rows in the pool: `auto` = dtype; `int8` or `fp8` with a scale for each row, which takes a
    quarter of float32 and rounds scores (docs/devices.md has the error)."""
    kv_cache_dtype: str = "auto"
    """Of K and V in the pool: `auto` = dtype; `fp8`, likewise, with torch attention alone."""
    attention_backend: str = "auto"
    """`auto`: the fastest for the device; `cpu`: compiled kernels; `torch`: the reference;
    `xformers`: its paged kernel, for softmax models on CUDA."""
    max_retrieval_matrix_bytes: int = 1 << 30
    """Limit of the item matrix that retrieval needs beside the pool; 0 = candidates only."""
    num_threads: int | None = None
    """Threads that torch computes with; None = its own choice."""
    gpu_memory_utilization: float | None = None
    """Share of a GPU's memory that the engine takes: what weights and the largest step leave of it
    is the pool, whatever `pool_bytes` says; None = the pool has `pool_bytes`. A GPU that is named
    by its number is shared evenly by all engines of a front. Not read on a CPU."""
    enforce_eager: bool = False
    """Capture no CUDA graphs of steps whose shapes repeat. Not read on a CPU."""

    def __post_init__(self) -> None:
        """Checks each value.

        Raises:
            ValueError: names the field and its limit.
        """
        _require_at_least("num_engines", self.num_engines, 1)
        if self.num_threads is not None:
            _require_at_least("num_threads", self.num_threads, 1)
        for name, value, known in (
            ("dtype", self.dtype, DTYPES),
            ("row_dtype", self.row_dtype, ROW_DTYPES),
            ("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES),
        ):
            if value not in known:
                raise ValueError(f"{name}: must be one of {', '.join(known)}, not {value!r}")
        _require_at_least("max_retrieval_matrix_bytes", self.max_retrieval_matrix_bytes, 0)
        share = self.gpu_memory_utilization
        if share is not None and not 0.0 < share <= 1.0:
            raise ValueError(f"gpu_memory_utilization: must be above 0 and up to 1, not {share}")

    @property
    def kv_number_bytes(self) -> int:
        """Bytes of a number of K and V in the pool."""
        return 1 if self.kv_cache_dtype == "fp8" else {"float32": 4, "bfloat16": 2}[self.dtype]


@dataclass(frozen=True, slots=True)
class HostTierConfig:
    """Where all rows always are."""

    source: str = field(default="mmap", repr=False)
    """`mmap`: the model directory's own file, memory-mapped; or a parameter server that holds the
    same tables, `redis://[user:password@]host:port/db`."""
    timeout: float = 1.0
    """Seconds to connect to a parameter server, and seconds that it may leave a read unanswered;
    then the step fails. Well below `hang_timeout`."""
    refill_bytes_per_second: int = 64 << 20
    """Most that is read in the background, to fill pages that EMB got; 0 = nothing."""
    link_bytes_per_second: int | None = None
    """What the link carries; refill takes what requests leave of it. None = unknown."""

    def __post_init__(self) -> None:
        """Checks each value.

        Raises:
            ValueError: names the field; never shows the source, which may hold a password.
        """
        try:
            _ = self.redis_address
        except ValueError as error:
            raise ValueError(f"host_tier: must be mmap or the URL of a Redis: {error}") from None
        if not 0.0 < self.timeout < float("inf"):
            raise ValueError(f"host_tier_timeout: must be above 0 and finite, not {self.timeout}")
        _require_at_least("refill_bytes_per_second", self.refill_bytes_per_second, 0)
        if self.link_bytes_per_second is not None:
            _require_at_least("host_link_bytes_per_second", self.link_bytes_per_second, 1)

    @property
    def refill(self) -> RefillConfig:
        """The budget of refill on the link."""
        cap, link = float(self.refill_bytes_per_second), self.link_bytes_per_second
        if link is None:
            return RefillConfig(cap)
        # A tenth is left free, and requests that take half of the link have it to themselves.
        return RefillConfig(
            cap, float(link), margin_bytes_per_s=link / 10, mark_bytes_per_s=link / 2
        )

    @property
    def redis_address(self) -> RedisAddress | None:
        """The parameter server; None = memory map."""
        return None if self.source == "mmap" else parse_redis_url(self.source)

    def describe(self) -> dict[str, Any]:
        """What `/info` shows: no user and no password."""
        link = {
            "refill_bytes_per_second": self.refill_bytes_per_second,
            "link_bytes_per_second": self.link_bytes_per_second,
        }
        address = self.redis_address
        if address is None:
            return {"source": "mmap", **link}
        return {"source": f"redis://{address}", "timeout": self.timeout, **link}


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What a single request may ask for; shown by `/info`."""

    max_body_bytes: int = 16 << 20
    """Bytes of a request's body; larger ones are refused (413) before they are parsed."""
    max_history_events: int = 65_536
    """Events one history may bring; the model's config says which of them are read."""
    max_requests: int = 64
    """Requests that one body may bring; more are refused (413)."""
    max_candidates: int = 4096
    max_top_k: int = 4096

    def __post_init__(self) -> None:
        """Checks each value.

        Raises:
            ValueError: names the field and its limit.
        """
        _require_at_least("max_body_bytes", self.max_body_bytes, 1)
        _require_at_least("max_history_events", self.max_history_events, 1)
        _require_at_least("max_requests", self.max_requests, 1)
        _require_at_least("max_candidates", self.max_candidates, 1)
        _require_at_least("max_top_k", self.max_top_k, 1)


@dataclass(frozen=True, slots=True)
class ResidencyConfig:
    """How routers are told what the engine holds."""

    endpoint: str | None = None
    """ZeroMQ address that events are published on: bound if it has `*` or `::` in it or is `ipc`,
    else connected to (vLLM's rule); None = nothing is noted and nothing published."""
    replay_endpoint: str | None = None
    """Address that is bound for those who missed events; None = they begin anew."""
    redact: bool = False
    """Leaves out item ids and the digest of the other features."""
    buffer_batches: int = 10_000
    """Last batches of each topic that can be replayed."""
    digest_positions: int = 1 << 23
    """Limit of the row digest; a table of more rows is hashed onto so many positions."""
    digest_interval_s: float = 0.1
    """Changes of the row digest are published no more often."""
    engine_name: str | None = None
    """The engine in topics; None = the host's name."""

    def __post_init__(self) -> None:
        """Checks each value.

        Raises:
            ValueError: names the field and its limit.
        """
        if self.replay_endpoint is not None and self.endpoint is None:
            raise ValueError("kv_events_replay_endpoint: needs kv_events_endpoint")
        _require_at_least("kv_events_buffer", self.buffer_batches, 1)
        if not 1 <= self.digest_positions <= 1 << 32:
            raise ValueError(
                f"row_digest_positions: must be within 1..2**32, not {self.digest_positions}"
            )
        if not 0.0 <= self.digest_interval_s < float("inf"):
            raise ValueError(
                f"row_digest_interval: must be at least 0 and finite, not {self.digest_interval_s}"
            )
        if "@" in self.name:
            raise ValueError(f"engine_name: must not hold an @, not {self.name!r}")

    @property
    def name(self) -> str:
        """The engine in topics."""
        return self.engine_name or socket.gethostname()


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """One engine."""

    model_dir: Path
    pool: PoolConfig = field(default_factory=PoolConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)
    host_tier: HostTierConfig = field(default_factory=HostTierConfig)
    limits: RequestLimits = field(default_factory=RequestLimits)
    controller: ControllerConfig = field(default_factory=ControllerConfig)
    residency: ResidencyConfig = field(default_factory=ResidencyConfig)
    served_model_name: str | None = None
    """Name in `/v1/models` and in requests; the directory's name by default."""
    cost_profile: Path | None = None
    """JSON file with the device's milliseconds (`CostProfile`); with it the engine estimates what
    one page more or less would save each tenant."""
    poison_freed_memory: bool = False
    """Debugging aid: freed pages and slots are filled with NaN, so that a read of freed memory
    shows in the scores."""

    def __post_init__(self) -> None:
        """Accepts the directory as a string too.

        Raises:
            ValueError: the controller is unknown, or cannot do without a cost profile.
        """
        object.__setattr__(self, "model_dir", Path(self.model_dir))
        if self.controller.name is not None:
            check_controller(self.controller.name, has_costs=self.cost_profile is not None)

    @property
    def model_name(self) -> str:
        """The name under which the model is served."""
        return self.served_model_name or self.model_dir.resolve().name


@dataclass(frozen=True, slots=True)
class FleetConfig:
    """Which engines stand behind a front, and which of them gets a request."""

    num_engines: int = 1
    """Engine cores that the front starts and looks after itself, or replicas of Ray."""
    num_fronts: int = 1
    """Processes that speak HTTP; several only under Ray."""
    remote: tuple[str, ...] = ()
    """Engines of other hosts, `tcp://host:port` each (`helm-engine engine`)."""
    policy: str = "joint"
    """How an engine is chosen, by its name in `router.policies`."""
    hedge_ms: float | None = None
    """A request without an answer after so long is given to a second engine too, and the first
    answer counts; None = never."""
    suspect_timeout: float = 1.0
    """Seconds; an engine whose process shows no life for so long gets no requests, and those that
    it has are given to others. Well below `hang_timeout`."""
    user_key: bytes | None = field(default=None, repr=False)
    """Keys the hashes of users; fronts that share engines need the same. None = a random one."""

    def __post_init__(self) -> None:
        """Checks each value.

        Raises:
            ValueError: names the field and its limit.
        """
        _require_at_least("num_engines", self.num_engines, 0 if self.remote else 1)
        _require_at_least("num_fronts", self.num_fronts, 1)
        if len(set(self.remote)) < len(self.remote):
            raise ValueError("engine: the same address is named twice")
        for address in self.remote:
            check_tcp_address("engine", address)
        if self.hedge_ms is not None and not 0.0 < self.hedge_ms < float("inf"):
            raise ValueError(f"hedge_ms: must be above 0 and finite, not {self.hedge_ms}")
        if not self.suspect_timeout > 0.0:
            raise ValueError(f"suspect_timeout: must be above 0, not {self.suspect_timeout}")
        if self.user_key is None and self.remote:
            raise ValueError(
                "user_key_file: engines of other hosts need one, the same for all of their fronts"
            )


def check_tcp_address(name: str, address: str) -> None:
    """Checks an address `tcp://host:port`.

    Args:
        name: what a message begins with.
        address: as the operator gave it.

    Raises:
        ValueError: it is none.
    """
    parts = urlsplit(address)
    try:
        is_fine = parts.scheme == "tcp" and bool(parts.hostname) and parts.port is not None
    except ValueError:  # The port is no number, or too large a one.
        is_fine = False
    if not is_fine or parts.path or parts.query or parts.username is not None:
        raise ValueError(f"{name}: {address!r} is not an address such as tcp://10.0.0.7:7000")


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """The HTTP front and how it looks after its engines."""

    shutdown_timeout: float = 10.0
    """Seconds that requests in flight have after SIGTERM; then they are answered with 503."""
    hang_timeout: float = 30.0
    """Seconds; an engine core that says nothing for so long is killed and started anew. It says
    something between steps: no step may take longer."""
    start_timeout: float = 600.0
    """Seconds; an engine that is not loaded and warm by then is given up."""
    body_timeout: float = 30.0
    """Seconds that a client has to send a body; it holds a place in the queue meanwhile."""
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """Any of these lets a client ask; none = everybody may."""
    admin_keys: tuple[str, ...] = field(default=(), repr=False)
    """Any of these lets an operator reload; none = nobody may over HTTP."""
    otlp_traces_endpoint: str | None = None
    """URL that OpenTelemetry spans are sent to; None = no traces."""
    record_trace: Path | None = None
    """File that gets a record of each request, ids hashed; None = nothing is recorded."""
    record_trace_max_bytes: int = 1 << 30
    """Where that file ends."""
    fleet: FleetConfig = field(default_factory=FleetConfig)
    """The engines behind the front."""

    def __post_init__(self) -> None:
        """Checks each value.

        Raises:
            ValueError: names the field and its limit.
        """
        if not self.shutdown_timeout >= 0.0:
            raise ValueError(f"shutdown_timeout: must be at least 0, not {self.shutdown_timeout}")
        if not self.hang_timeout >= 1.0:
            raise ValueError(f"hang_timeout: must be at least 1 second, not {self.hang_timeout}")
        if not self.start_timeout > 0.0:
            raise ValueError(f"start_timeout: must be above 0, not {self.start_timeout}")
        if not self.body_timeout > 0.0:
            raise ValueError(f"body_timeout: must be above 0, not {self.body_timeout}")
        _require_at_least("record_trace_max_bytes", self.record_trace_max_bytes, 1 << 16)
