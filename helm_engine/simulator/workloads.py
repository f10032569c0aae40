"""What a workload is: a data setting, and regimes that follow one another; JSON with every limit.

`docs/simulator.md` has the schema with an example. What is drawn from it is in `trace`.
"""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from helm_engine.datasets.event_model import MAX_ZIPF_EXPONENT
from helm_engine.datasets.ml100k import NUM_ITEMS

BUILTIN = Path(__file__).with_name("builtin")

_MOST_USERS = 1 << 24
_MOST_EVENTS = 1 << 16
_MOST_ITEMS = 1 << 27
ML100K_ITEMS = NUM_ITEMS * NUM_ITEMS
"""See `events.ml100k`."""

Name = Annotated[str, Meta(min_length=1)]
Positive = Annotated[float, Meta(gt=0.0, le=1e9)]
NotNegative = Annotated[float, Meta(ge=0.0, le=1e9)]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Exponent = Annotated[float, Meta(ge=0.0, le=MAX_ZIPF_EXPONENT)]
Users = Annotated[int, Meta(ge=1, le=_MOST_USERS)]
EventCount = Annotated[int, Meta(ge=1, le=_MOST_EVENTS)]
Bytes = Annotated[int, Meta(ge=1, le=1 << 50)]


class Setting(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The data, the pool that has too little room for it, and the load that it is asked to bear.

    Events are one token each and positions count from the oldest, so a returning user's KV is
    reused exactly.
    """

    name: Name
    data: Literal["dlrmv3", "ml100k", "production", "recorded"]
    """Law of events, by its file in `events`; `recorded`: they were recorded and follow none."""
    profile: Name
    """Cost profile of the device that the load is chosen for, by name or file."""
    requests_per_s: Positive
    """Arrivals at a load of 1."""
    slo_ms: Positive
    """Latency that a request must not exceed."""
    num_users: Users
    num_items: Annotated[int, Meta(ge=1, le=_MOST_ITEMS)]
    num_categories: Annotated[int, Meta(ge=1, le=4096)] | None = None
    """Of `dlrmv3` only, as `categories_per_user`."""
    categories_per_user: Annotated[int, Meta(ge=1, le=64)] | None = None
    max_history: EventCount
    """A user whose history would grow beyond it is gone; a new one takes the id."""
    row_bytes: Annotated[int, Meta(ge=1, le=1 << 20)]
    kv_bytes_per_token: Annotated[int, Meta(ge=1, le=1 << 24)]
    """Of K and V over all layers."""
    pool_bytes: Bytes
    block_tokens: Annotated[int, Meta(ge=1, le=1024)] = 16

    def __post_init__(self) -> None:
        """Checks what concerns two fields.

        Raises:
            ValueError: names the field and its limit.
        """
        _given_if(self.data == "dlrmv3", "num_categories", self.num_categories, self.data)
        _given_if(self.data == "dlrmv3", "categories_per_user", self.categories_per_user, self.data)
        if (self.num_categories or 0) > self.num_items:
            raise ValueError(f"num_categories: {self.num_categories} is above num_items")
        if (self.categories_per_user or 0) > (self.num_categories or 0):
            raise ValueError(f"categories_per_user: {self.categories_per_user} is above all")
        if self.data == "ml100k" and self.num_items != ML100K_ITEMS:
            raise ValueError(
                f"num_items: {self.num_items} is not {ML100K_ITEMS:,}, the square of MovieLens' "
                f"{NUM_ITEMS:,}"
            )

    @property
    def table_bytes(self) -> int:
        """Of all rows."""
        return self.num_items * self.row_bytes


def _given_if(is_needed: bool, field: str, value: object, data: str) -> None:
    """Raises ValueError if a field is absent where the data need it, or given where they do not."""
    if is_needed and value is None:
        raise ValueError(f"{field}: is absent, and the data {data} need it")
    if not is_needed and value is not None:
        raise ValueError(f"{field}: means nothing to the data {data}")


class Regime(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A stretch of time in which requests follow the same laws."""

    name: Name
    seconds: Positive
    ramp_s: NotNegative = 0.0
    """So long the laws of the regime before give way: the load rises or falls evenly, and each
    request follows the new laws with a probability that rises evenly from 0 to 1."""
    load: Positive = 1.0
    """Times the setting's requests per second."""
    hot_user_share: Share
    """Share of the requests that hot users make, all alike."""
    hot_users: Users
    first_hot_user: Annotated[int, Meta(ge=0, lt=_MOST_USERS)] = 0
    """Hot users are so many from this id on."""
    hot_user_regularity: Annotated[int, Meta(ge=1, le=64)] = 1
    """Of so many hot users drawn at random, the one who has been away longest makes the request.
    1 = visits at random times; more = at intervals that vary less, as of a scrolled feed."""
    user_zipf: Exponent = 0.0
    """Exponent of how often the others come, who are all users; 0 = all alike."""
    history_mean: EventCount
    """Events of users who come for the first time in this regime: a normal law, cut off at 1 and
    at the setting's `max_history`."""
    history_sd: NotNegative = 0.0
    new_events: EventCount
    """Of a visit, that the user's next visit finds in the history; they are candidates."""
    candidates: EventCount
    """Of a request; those drawn twice count once."""
    item_zipf: Exponent | None = None
    """Exponent of the popularity of items inside a category; 0 = all alike. Of `dlrmv3` only: the
    other data have a popularity of their own."""
    catalogue_share: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    """Of `dlrmv3` only: of each category's items, those that are on offer, the most popular."""
    drift_per_s: NotNegative = 0.0
    """New items that become the most popular, in each second; `dlrmv3`: of each category. Not of
    `ml100k`."""

    def __post_init__(self) -> None:
        """Checks what concerns two fields.

        Raises:
            ValueError: names the field and its limit.
        """
        if self.ramp_s > self.seconds:
            raise ValueError(f"ramp_s: {self.ramp_s} is above seconds, {self.seconds}")
        if self.new_events > self.candidates:
            raise ValueError(f"new_events: {self.new_events} is above candidates")


class Workload(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Regimes that follow one another, over one data setting."""

    name: Name
    description: str
    setting: Name | Setting
    """A setting of the package by name, or a setting."""
    warm_up_s: NotNegative
    """The first regime lasts so much longer, and requests of that time are not counted."""
    regimes: Annotated[list[Regime], Meta(min_length=1, max_length=10_000)]
    arrivals: Name | None = None
    """File of real arrival times that the requests follow; None = a Poisson process."""

    def __post_init__(self) -> None:
        """Checks what concerns the first regime.

        Raises:
            ValueError: names the field and its limit.
        """
        if self.regimes[0].ramp_s:
            raise ValueError("regimes[0].ramp_s: no regime is before it")

    @property
    def ends(self) -> list[float]:
        """When each regime ends, in seconds after the start, the warm-up included."""
        return list(accumulate((one.seconds for one in self.regimes), initial=self.warm_up_s))[1:]

    @property
    def resolved_setting(self) -> Setting:
        """The setting itself.

        Raises:
            ValueError: the package has none of this name, or a regime does not fit it.
        """
        setting = self.setting
        if isinstance(setting, str):
            setting = _read(_builtin("settings", setting, "setting"), Setting)
        self.check_fits(setting)
        return setting

    def check_fits(self, setting: Setting) -> None:
        """Checks the regimes against a setting.

        Raises:
            ValueError: names the regime, the field and its limit.
        """
        for place, regime in enumerate(self.regimes):
            name = f"regimes[{place}]"
            if regime.first_hot_user + regime.hot_users > setting.num_users:
                raise ValueError(f"{name}.hot_users: there are {setting.num_users} users from 0 on")
            if regime.history_mean > setting.max_history:
                raise ValueError(
                    f"{name}.history_mean: {regime.history_mean} is above max_history, "
                    f"{setting.max_history}"
                )
            is_dlrmv3 = setting.data == "dlrmv3"
            _given_if(is_dlrmv3, f"{name}.item_zipf", regime.item_zipf, setting.data)
            if not is_dlrmv3 and regime.catalogue_share != 1.0:
                raise ValueError(
                    f"{name}.catalogue_share: means nothing to the data {setting.data}"
                )
            if setting.data == "ml100k" and regime.drift_per_s:
                raise ValueError(f"{name}.drift_per_s: the data ml100k do not drift")


def builtin_names(kind: Literal["workloads", "settings", "profiles"]) -> list[str]:
    """What the package brings."""
    return sorted(path.stem for path in (BUILTIN / kind).glob("*.json"))


def builtin_or_file(
    kind: Literal["workloads", "settings", "profiles"], name: str, field: str
) -> Path:
    """The file of one of the package's by name, or else the file of this name.

    Raises:
        ValueError: names the field, and what there is.
    """
    path = Path(name)
    return path if path.suffix == ".json" else _builtin(kind, name, field)


def load_workload(name: str, setting: str | None = None) -> Workload:
    """Reads a workload of the package by name, or a JSON file.

    Args:
        name: of the workload.
        setting: name or file of a setting to use instead of the workload's own. Where the package
            has a workload NAME-SETTING, its regimes are the ones.

    Raises:
        ValueError: names the file and the field.
    """
    made_for_it = f"{name}-{setting}"
    if made_for_it in builtin_names("workloads"):
        name, setting = made_for_it, None
    path = builtin_or_file("workloads", name, "workload")
    workload = _read(path, Workload)
    if workload.arrivals is not None:
        beside = str(path.parent / workload.arrivals)
        workload = msgspec.structs.replace(workload, arrivals=beside)
    if setting is not None:
        workload = msgspec.structs.replace(workload, setting=load_setting(setting))
    try:
        _ = workload.resolved_setting
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return workload


def load_setting(name: str) -> Setting:
    """Reads a setting of the package by name, or a JSON file.

    Raises:
        ValueError: names the file and the field.
    """
    return _read(builtin_or_file("settings", name, "setting"), Setting)


def _builtin(kind: str, name: str, field: str) -> Path:
    path = BUILTIN / kind / f"{name}.json"
    if path.parent != BUILTIN / kind or not path.is_file():
        known = ", ".join(one.stem for one in sorted((BUILTIN / kind).glob("*.json")))
        raise ValueError(f"{field}: {name!r} is none of {known}, nor the name of a .json file")
    return path


_Read = TypeVar("_Read", bound=msgspec.Struct)


def _read(path: Path, kind: type[_Read]) -> _Read:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ValueError(f"{path}: {_field_first(str(error))}") from error


def _field_first(message: str) -> str:
    """`Expected ... - at `$.regimes[0].load`` as `regimes[0].load: Expected ...`."""
    problem, _, place = message.partition(" - at `$")
    place = place.removesuffix("`").removeprefix(".")
    return f"{place}: {problem}" if place else problem


def as_json(what: Workload | Setting) -> dict[str, Any]:
    """All fields, defaults included."""
    return dict(msgspec.to_builtins(what))
