"""`config.json` of a model directory: every value validated, unknown keys refused.

"HSTU" names several incompatible functions, so a directory names its dialect and each dialect has
a config of its own:

research   meta-recsys/generative-recommenders, research/modeling/sequential/hstu.py (retrieval)
stu        the same repository, modules/stu.py and modules/dlrm_hstu.py: DLRMv3 (ranking)
nvidia     NVIDIA/recsys-examples, the HSTU block of its ranking example
sasrec     Kang and McAuley, "Self-Attentive Sequential Recommendation", 2018 (no HSTU: softmax)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from model_executor.exceptions import ModelDirectoryError

ITEM_TABLE = "item_embedding"
SMALL_TABLE_ROWS = 4096
"""Tables of contextual features up to this size are dense weights; larger ones share the pool."""

RESERVED_NAMES = ("item_ids", "actions", "timestamps", "start_index")
"""Fields of a request's events that no feature can be named after."""

Dimension = Annotated[int, Field(ge=1, le=65_536)]
Count = Annotated[int, Field(ge=1, le=1_048_576)]
Rows = Annotated[int, Field(ge=1, le=2**31 - 2)]
Epsilon = Annotated[float, Field(gt=0.0, le=1e-2)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class FeatureTable(_Frozen):
    """A categorical feature; its ids are rows of a table of its own, 0..num_rows-1."""

    name: Name
    num_rows: Rows


class ContextualFeature(FeatureTable):
    """One id per request, a token of its own before the history."""

    min_sequence_len: Annotated[int, Field(ge=0)] = 0
    """The vector counts as zeros while history and candidates together are fewer than this."""


class Task(_Frozen):
    """One output of a ranking head."""

    name: Name
    kind: Literal["binary", "regression"] = "binary"


class RowTable(NamedTuple):
    """A table whose rows live in the page pool, and where its rows start in the common row ids."""

    name: str
    num_rows: int
    first_row: int


class SequenceModelConfig(_Frozen):
    """What all dialects share: the transformer's sizes and which events it reads."""

    model_type: str
    dialect: str
    dtype: Literal["float32"]
    """Of the weights in the files; the engine may compute in another."""
    num_items: Rows
    embedding_dim: Dimension
    num_layers: Annotated[int, Field(ge=1, le=256)]
    num_heads: Annotated[int, Field(ge=1, le=256)]
    dqk: Dimension
    """Width of a query and of a key, per head."""
    dv: Dimension
    """Width of a value, per head."""
    max_sequence_len: Count
    """Events of a history that the model reads; longer ones are cut."""
    truncation: Literal["newest", "oldest"] = "newest"
    """Which events a cut keeps."""
    anchor_stride: Count = 1
    """Windows of the newest events begin at multiples of this, counted from a user's first event:
    with positions from the oldest event, reuse survives that many events before all shift."""
    layer_norm_eps: Epsilon

    @model_validator(mode="after")
    def _check_anchor(self) -> Self:
        if self.anchor_stride > self.max_sequence_len:
            raise ValueError(
                f"anchor_stride: {self.anchor_stride} is above max_sequence_len, "
                f"{self.max_sequence_len}"
            )
        return self

    first_item_id: ClassVar[int] = 0
    uses_timestamps: ClassVar[bool] = False
    candidates_in_sequence: ClassVar[bool] = False
    """Candidates run through the layers as rows behind the history; otherwise each is scored by an
    inner product with the history's last row."""

    @property
    def num_item_rows(self) -> int:
        """Rows of the item table."""
        return self.first_item_id + self.num_items

    @property
    def tokens_per_event(self) -> int:
        """Rows that one event takes in a sequence."""
        return 1

    @property
    def row_dim(self) -> int:
        """Width of a row in the pool."""
        return self.embedding_dim

    @property
    def item_features(self) -> Sequence[FeatureTable]:
        """Features that events and candidates bring beside their items."""
        return ()

    @property
    def contextual_features(self) -> Sequence[ContextualFeature]:
        """Features of a request, in the order of their tokens."""
        return ()

    @property
    def num_actions(self) -> int:
        """Actions are 0 .. num_actions-1; 0 = the model reads none."""
        return 0

    @property
    def task_list(self) -> Sequence[Task]:
        """Outputs of the ranking head; none where items are scored by inner product."""
        return ()

    @property
    def candidate_group_size(self) -> int:
        """Candidates attend within groups of this many."""
        return 1

    @property
    def kv_elements_per_token(self) -> int:
        """Numbers that K and V of one token take over all layers."""
        return self.num_layers * self.num_heads * (self.dqk + self.dv)

    @property
    def num_contextual_tokens(self) -> int:
        """Tokens before the history."""
        return len(self.contextual_features)

    @property
    def max_context_tokens(self) -> int:
        """Tokens of the longest context: contextual ones and those of a longest history."""
        return self.num_contextual_tokens + self.tokens_per_event * self.max_sequence_len

    @property
    def row_tables(self) -> list[RowTable]:
        """Tables whose rows live in the pool; items first."""
        sizes = {ITEM_TABLE: self.num_item_rows}
        for feature in self.contextual_features:
            if feature.num_rows > SMALL_TABLE_ROWS:
                sizes[f"contextual.{feature.name}"] = feature.num_rows
        ends = accumulate(sizes.values())
        return [
            RowTable(name, rows, end - rows)
            for (name, rows), end in zip(sizes.items(), ends, strict=True)
        ]

    @property
    def num_rows(self) -> int:
        """Rows of all pooled tables together."""
        return sum(table.num_rows for table in self.row_tables)


class ResearchConfig(SequenceModelConfig):
    """HSTU for retrieval: relative position and time bias, inner-product scoring."""

    model_type: Literal["hstu"]
    dialect: Literal["research"]
    max_output_len: Annotated[int, Field(ge=0, le=65_536)]
    """Positions beyond `max_sequence_len` that the tables hold (11 in the published configs)."""
    num_time_buckets: Annotated[int, Field(ge=1, le=1_024)]
    """Largest time bucket; the time table has one entry more."""
    l2_norm_eps: Epsilon

    first_item_id: ClassVar[int] = 1  # Row 0 of the item table is padding.
    uses_timestamps: ClassVar[bool] = True

    @property
    def num_positions(self) -> int:
        """Rows of the position table, and the constant n that divides attention weights."""
        return self.max_sequence_len + self.max_output_len

    @property
    def normaliser(self) -> int:
        """The constant n that divides attention weights."""
        return self.num_positions


class RankingConfig(SequenceModelConfig):
    """What the two ranking dialects share: features, tasks, candidates as rows."""

    contextual: list[ContextualFeature] = []
    tasks: Annotated[list[Task], Field(min_length=1)]
    rank_by: str | None = None
    """Task whose output is an item's score; default: the first."""

    candidates_in_sequence: ClassVar[bool] = True

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        for field, names in (
            ("contextual", [feature.name for feature in self.contextual]),
            ("features", [feature.name for feature in self.item_features]),
            ("tasks", [task.name for task in self.tasks]),
        ):
            if len(set(names)) < len(names):
                raise ValueError(f"{field}: names must differ")
        for feature in self.item_features:
            if feature.name in RESERVED_NAMES:
                raise ValueError(f"features: {feature.name!r} is a field of every request")
        if self.rank_by is not None and self.rank_by not in [task.name for task in self.tasks]:
            raise ValueError(f"rank_by: {self.rank_by!r} is none of the tasks")
        return self

    @property
    def contextual_features(self) -> Sequence[ContextualFeature]:
        """Features of a request, in the order of their tokens."""
        return self.contextual

    @property
    def task_list(self) -> Sequence[Task]:
        """Outputs of the ranking head."""
        return self.tasks

    @property
    def rank_task(self) -> int:
        """Place of the task whose output is an item's score."""
        names = [task.name for task in self.tasks]
        return 0 if self.rank_by is None else names.index(self.rank_by)


class StuConfig(RankingConfig):
    """DLRMv3: positions and times count from the newest event, candidates see the history."""

    model_type: Literal["hstu"]
    dialect: Literal["stu"]
    table_dim: Dimension
    """Width of the rows of items and features."""
    features: list[FeatureTable] = []
    """Features of items beside their ids, with small tables of their own."""
    num_action_bits: Annotated[int, Field(ge=1, le=31)]
    """Actions are bit masks; each bit has a vector of its own."""
    action_dim: Dimension = 8
    max_candidates: Count
    num_positions: Count
    num_time_buckets: Count
    """Largest time bucket; the time table has one entry more."""
    preprocessor_hidden_dim: Dimension
    item_hidden_dim: Dimension = 512
    head_hidden_dim: Dimension = 512
    mlp_norm_eps: Epsilon = 1e-5
    group_norm: bool = False
    """One norm per head instead of one over all heads."""
    attention_scale: Annotated[float, Field(gt=0.0)] | None = None
    """Factor of q.k; default 1 / sqrt(dqk)."""
    max_attention_window: Annotated[int, Field(ge=0)] = 0
    """Newest tokens that a row attends to, itself apart; 0 = all."""
    contextual_rows_see_history: bool = False
    """Contextual rows read the whole history; as published they are plainly causal."""

    uses_timestamps: ClassVar[bool] = True

    @property
    def row_dim(self) -> int:
        """Width of a row in the pool."""
        return self.table_dim

    @property
    def item_features(self) -> Sequence[FeatureTable]:
        """Features that events and candidates bring beside their items."""
        return self.features

    @property
    def num_actions(self) -> int:
        """One beyond the largest bit mask."""
        return 1 << self.num_action_bits

    @property
    def normaliser(self) -> int:
        """The constant n that divides attention weights."""
        return self.max_sequence_len + self.max_candidates + self.num_contextual_tokens


class NvidiaConfig(RankingConfig):
    """Ranking HSTU of NVIDIA/recsys-examples: absolute positions, candidate groups, MLP head."""

    model_type: Literal["hstu"]
    dialect: Literal["nvidia"]
    num_position_buckets: Count
    """Rows of the position table; later tokens share the last one."""
    scaling_seqlen: Count
    """The constant n that divides attention weights; -1 (longest of the batch) is refused."""
    target_group_size: Count = 1
    action: FeatureTable | None = None
    """Every event is an item token and an action token; absent = item tokens alone."""
    prediction_head: Annotated[list[Dimension], Field(min_length=1)]
    """Widths of the head's layers; the last is the number of tasks."""
    l2_norm_eps: Epsilon = 1e-6

    @model_validator(mode="after")
    def _check_shapes(self) -> Self:
        if self.dqk != self.dv:
            raise ValueError(f"dv: must equal dqk in this dialect, {self.dv} is not {self.dqk}")
        if any(feature.min_sequence_len for feature in self.contextual):
            raise ValueError("contextual: min_sequence_len is not of this dialect")
        if self.prediction_head[-1] != len(self.tasks):
            raise ValueError(
                f"prediction_head: ends with {self.prediction_head[-1]} outputs, "
                f"there are {len(self.tasks)} tasks"
            )
        return self

    @property
    def tokens_per_event(self) -> int:
        """Two where events carry an action."""
        return 1 if self.action is None else 2

    @property
    def num_actions(self) -> int:
        """Rows of the action table."""
        return 0 if self.action is None else self.action.num_rows

    @property
    def candidate_group_size(self) -> int:
        """Candidates attend, causally, within groups of this many."""
        return self.target_group_size

    @property
    def normaliser(self) -> int:
        """The constant n that divides attention weights."""
        return self.scaling_seqlen


class SASRecConfig(SequenceModelConfig):
    """Softmax attention over absolute positions, inner-product scoring."""

    model_type: Literal["sasrec"]
    dialect: Literal["sasrec"]
    ffn_dim: Dimension

    first_item_id: ClassVar[int] = 1  # Row 0 of the item table is padding.


ModelConfig = ResearchConfig | StuConfig | NvidiaConfig | SASRecConfig

_CONFIGS: dict[str, type[ModelConfig]] = {
    "research": ResearchConfig,
    "stu": StuConfig,
    "nvidia": NvidiaConfig,
    "sasrec": SASRecConfig,
}
SUPPORTED_DIALECTS = tuple(_CONFIGS)


def parse_model_config(raw: dict[str, Any], source: str) -> ModelConfig:
    """Validates the parsed `config.json`.

    Raises:
        ModelDirectoryError: names the file, the field and what it must be.
    """
    dialect = raw.get("dialect")
    if not isinstance(dialect, str) or dialect not in _CONFIGS:
        problem = "is missing" if dialect is None else f"{dialect!r} is not supported"
        supported = ", ".join(SUPPORTED_DIALECTS)
        raise ModelDirectoryError(f"{source}: dialect: {problem} (supported: {supported})")
    try:
        return _CONFIGS[dialect].model_validate(raw)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'config'}: {item['msg']}"
            for item in error.errors(include_url=False)
        )
        raise ModelDirectoryError(f"{source}: {problems}") from error


def read_model_config(path: Path) -> ModelConfig:
    """Reads and validates a `config.json` file.

    Raises:
        ModelDirectoryError: if it is absent, not a JSON object, or has a bad value.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelDirectoryError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelDirectoryError(f"{path}: is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ModelDirectoryError(f"{path}: must hold a JSON object")
    return parse_model_config(raw, str(path))
