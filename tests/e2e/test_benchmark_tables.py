"""Tables and figures of README.md and docs/benchmarks.md are those of the result files."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from typing import Any

from tests.e2e.running_server import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
SYSTEMS = ("helm", "caches_off")
ROW_POLICIES = ("helm", "lru", "lfu", "optimum")
PAGE = (REPOSITORY / "docs" / "benchmarks.md").read_text(encoding="utf-8")


def result(name: str) -> Any:
    path = REPOSITORY / "benchmarks" / "results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def percent(share: float) -> str:
    return f"{share:.0%}".replace("%", " %")


def percent_1(share: float) -> str:
    return f"{share:.1%}".replace("%", " %")


def with_range(value: float, around: list[float]) -> str:
    return f"{value:.2f} ({around[0]:.2f} to {around[1]:.2f})"


SHOWN_ON_THE_PAGE_ALONE = {"ml100k"}
"""The README's table is that of the small DLRMv3; what MovieLens-100K does it has from a replay."""


def serving_ratios(left_out: Collection[str] = ()) -> Iterator[str]:
    serving = result("serving")
    ceilings = {cell["workload"]: cell["flop_ceiling"] for cell in serving["cells"]}
    for name, ratios in serving["ratios_by_workload"].items():
        if name in left_out:
            continue
        gain = with_range(ratios["throughput_vs_batched"], ratios["throughput_vs_batched_95"])
        share = percent(ratios["share_of_flop_ceiling"])
        yield (
            f"| `{name}` | {gain} | {ceilings[name]:.2f} | {share} | "
            f"{ratios['p99_vs_batched']:.2f} |"
        )


def rows() -> Iterator[str]:
    yield from serving_ratios()
    for cell in result("serving")["cells"]:
        yield (
            f"| `{cell['workload']}` | {cell['system']} | {cell['requests_per_s']:.1f} | "
            f"{cell['p50_ms']:.1f} | {cell['p99_ms']:.1f} | "
            f"{percent(cell['cached_token_share'])} | {percent(cell['row_hit_share'])} |"
        )
    overhead = result("overhead")
    for one in (overhead, *overhead["ablation"].values()):
        core = with_range(one["ms_per_batch"], one["ms_per_batch_quartiles"])
        whole = with_range(
            one["ms_per_batch_with_parse_and_ipc"],
            one["ms_per_batch_with_parse_and_ipc_quartiles"],
        )
        yield f"| {one['block_tokens']} | {core} | {whole} |"
    for cell in result("roofline")["cells"]:
        yield (
            f"| {cell['shape']} | {cell['tokens']} | {cell['dtype']} | {cell['gflops']:.0f} | "
            f"{cell['gemm_gflops']:.0f} | {cell['fraction']:.2f} |"
        )
    for cell in result("row_policy")["cells"]:
        shares = [percent_1(cell[f"{one}_hit_share"]) for one in ROW_POLICIES]
        yield (
            f"| `{cell['stream']}` | {percent(cell['slots_share'])} | {' | '.join(shares)} | "
            f"{cell['helm_vs_optimum']:.2f} | {', '.join(cell['better'])} |"
        )
        if "hit_share_after_change" in cell:
            after = [percent_1(cell["hit_share_after_change"][one]) for one in ROW_POLICIES]
            yield f"| {percent(cell['slots_share'])} | {' | '.join(after)} |"
    for move in result("pool")["page_moves"]:
        to_emb = with_range(move["to_emb_us"], move["to_emb_us_spread"])
        to_kv = with_range(move["to_kv_us"], move["to_kv_us_spread"])
        yield f"| {move['content']} | {to_emb} | {to_kv} | {move['moved_rows_per_page']:.0f} |"
    for cell in result("bfloat16")["cells"]:
        gain = with_range(cell["throughput_vs_float32"], cell["throughput_vs_float32_95"])
        yield (
            f"| `{cell['workload']}` | {gain} | {cell['largest_relative_error']:.3f} | "
            f"{cell['mean_relative_error']:.4f} | {percent(cell['top_10_agreement'])} |"
        )


def test_the_page_shows_every_cell() -> None:
    assert [row for row in rows() if row not in PAGE] == []


def test_the_readme_shows_the_ratios_of_every_workload_of_its_model() -> None:
    assert [row for row in serving_ratios(SHOWN_ON_THE_PAGE_ALONE) if row not in README] == []


def test_the_ratios_of_serving_are_those_of_the_long_histories() -> None:
    serving = result("serving")
    assert serving["ratios"] == serving["ratios_by_workload"]["abs_4096"]


def test_a_cell_of_serving_is_named_by_its_workload_and_system() -> None:
    serving = result("serving")
    names = [(cell["workload"], cell["system"]) for cell in serving["cells"]]
    by_workload = {(name, one) for name in serving["ratios_by_workload"] for one in SYSTEMS}
    assert len(names) == len(by_workload)
    assert {*names} == by_workload


def test_both_show_what_loadgen_found() -> None:
    loadgen = result("loadgen")
    for text in (" ".join(README.split()), " ".join(PAGE.split())):
        assert f"{loadgen['offline_samples_per_s']:.0f} samples/s" in text
        assert f"{loadgen['server_qps_p99_80ms']:.0f} queries/s" in text


def test_both_show_what_overload_and_soak_found() -> None:
    page, overload = " ".join(PAGE.split()), result("overload")
    (soak,) = result("soak")["runs"]
    assert overload["problems"] == []
    assert soak["num_problems"] == 0
    flat = soak["flat"]
    figures = [
        with_range(overload["goodput_ratio"], overload["goodput_ratio_range"]),
        f"{overload['overload_goodput_per_s']:.0f} answers a second",
        f"against {overload['peak_goodput_per_s']:.0f}",
        f"at most {overload['most_waiting']} requests waiting",
        f"{soak['requests']} requests",
        f"{len(soak['reloads'])} reloads",
        f"{soak['quiet_moments']} quiet moments",
        f"front grew by {flat['front']['mib_per_minute']:.2f} MiB a minute",
        f"engine core by {flat['core']['mib_per_minute']:.2f}",
        f"{flat['front']['files']['second_half']} and {flat['core']['files']['second_half']} file",
    ]
    assert [figure for figure in figures if figure not in page] == []
    assert f"keeps {overload['goodput_ratio']:.2f} of the peak" in " ".join(README.split())


def test_the_page_shows_what_the_books_of_the_pool_cost() -> None:
    page, pool = " ".join(PAGE.split()), result("pool")
    figures = [
        f"10,000 rows takes {pool['lookup_10k_us']:.0f} µs",
        f"{pool['plan_10k_us']:.0f} µs as a whole step",
        f"displace as many takes {pool['admit_evict_1k_us']:.0f} µs",
        f"{pool['page_move_us']:.1f} µs on average",
        f"{pool['compaction_us_per_row']:.2f} µs for each row",
        f"{pool['bytes_per_row']:.0f} bytes for each row of the table",
        f"{pool['bytes_per_slot']:.0f} for each slot",
        f"{pool['bytes_per_block']:.0f} for each block",
    ]
    assert [figure for figure in figures if figure not in page] == []


def test_the_page_shows_how_long_the_pool_machine_ran() -> None:
    page, run = " ".join(PAGE.split()), result("pool_machine")
    assert run["steps"] >= 1_000_000
    assert (
        f"In {run['steps']} steps of {run['machines']} machines {run['pages_moved']} pages" in page
    )
    assert f"{run['rows_moved']} rows were moved" in page
    assert (
        f"{run['engine_steps']} engine steps that succeeded and {run['engine_steps_failed']} that"
        in page
    )


def test_every_result_says_where_it_comes_from() -> None:
    for path in (REPOSITORY / "benchmarks" / "results").glob("*.json"):
        found = json.loads(path.read_text(encoding="utf-8"))
        assert {"command", "machine", "versions", "seeds"} <= found.keys(), path.name
