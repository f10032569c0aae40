"""Tables and figures of README.md and docs/benchmarks.md are those of the result files."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from typing import Any

from benchmarks import cluster_tables, controller_tables, real_tables
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


def page_value_rows() -> Iterator[str]:
    """A line for each split and tenant: the error that is largest of all seeds, by sampling."""
    page_value = result("page_value")
    by_cell: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for line in page_value["cells"]:
        by_cell.setdefault((line["split"], line["profile"], line["tenant"]), []).append(line)
    for (split, profile, tenant), lines in by_cell.items():
        by_shares: dict[tuple[float, float], list[float]] = {}
        for line in lines:
            shares = (line["user_share"], line["row_share"])
            by_shares.setdefault(shares, []).append(line["error"])
        brute = [sum(line["brute_force_ms"]) / 2 for line in lines]
        worst = [signed_percent(max(errors, key=abs)) for errors in by_shares.values()]
        first = lines[0]
        yield (
            f"| `{split}` | {first['kv_pages']} + {first['emb_pages']} | {profile} | {tenant} | "
            f"{sum(brute) / len(brute):.4f} | {' | '.join(worst)} |"
        )
    for line in page_value["overhead"]:
        quartiles = " to ".join(percent(share) for share in line["added_quartiles"])
        yield (
            f"| {line['shape']} | 1/{1 / line['user_share']:.0f} | 1/{1 / line['row_share']:.0f} | "
            f"{percent(line['added'])} ({quartiles}) | {line['added_us_per_visit']:.0f} | "
            f"{line['scheduler_us_per_visit']:.0f} |"
        )


def signed_percent(share: float) -> str:
    return f"{share:+.0%}".replace("%", " %")


def moving_rows() -> Iterator[str]:
    for cell in result("moving")["cells"]:
        begins, ends = cell["emb_fraction"]
        boundary = f"{begins:.2f}" if begins == ends else f"{begins:.2f} to {ends:.2f}"
        moved = "" if cell["moved_after_s"] is None else f"{cell['moved_after_s']:.2f}"
        waited = cell["refill_bytes_on_critical_path"] / 2**20
        yield (
            f"| {cell['time']} | `{cell['arm']}` | {boundary} | {cell['p50_ms']:.1f} | "
            f"{cell['p99_ms']:.1f} | {percent(cell['row_hit_share'])} | "
            f"{percent(cell['cached_token_share'])} | {moved} | {waited:.0f} |"
        )


def test_the_page_shows_every_cell() -> None:
    shown = (*rows(), *page_value_rows(), *moving_rows())
    assert [row for row in shown if row not in PAGE] == []


def test_the_page_shows_what_a_move_costs() -> None:
    page, moving = " ".join(PAGE.split()), result("moving")
    for time in ("virtual", "real"):
        for mover in ("moving", "naive"):
            found = moving["ratios"][time][mover]
            assert with_range(found["ratio"], found["interval"]) in page
    assert f"{moving['max_score_diff']:.1e}" in page
    assert (moving["failed_requests"], moving["refill_bytes_on_critical_path"]) == (0, 0)


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
        f"{pool['alloc_vs_vllm_ratio']:.2f} of the time that vLLM's own pool takes",
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


def test_the_page_of_controllers_shows_the_figures_of_their_file() -> None:
    page = (REPOSITORY / "docs" / "controller-results.md").read_text(encoding="utf-8")
    found = result("controller") if controller_tables.RESULT.is_file() else {}
    assert controller_tables.filled(page, found) == page


def test_the_page_of_clusters_shows_the_figures_of_their_file() -> None:
    page = (REPOSITORY / "docs" / "cluster.md").read_text(encoding="utf-8")
    found = result("cluster") if cluster_tables.RESULT.is_file() else {}
    assert cluster_tables.filled(page, found) == page


def test_the_page_shows_what_was_run_for_real() -> None:
    assert real_tables.filled(PAGE) == PAGE
