"""Time mla_decode beside other libraries: the same inputs, the same run, in turns.

    python tools/peer_bench.py [--only GROUP] [--peer NAME] [--flashmla-so FILE] [--fa3-so FILE] [--sms N]
                               [--samples N] [--json FILE] [--pictures DIRECTORY]
    python tools/peer_bench.py --from FILE [--pictures DIRECTORY]
    python tools/peer_bench.py --markdown FILE

Measured are whatever libraries are importable (tools/peers has an adapter for each, and says of the others why they are
skipped) and the stream floor, as tools/bench.py does: CUDA events around one call, the L2 cache cleaned before each by
reading 1 GiB, medians of N samples in each of two rounds with other inputs. What a library plans once a step is planned
before. Every output is compared with ours first; one that differs is reported and not timed.

`--from` shows an earlier result and draws its pictures, `--markdown` prints the README's table; they need no GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import peers
import pictures
from bench import (
    PAGE_BYTES,
    ROUNDS,
    SAMPLES,
    SOFTMAX_SCALE,
    TOKENS,
    Bench,
    Cell,
    K,
    Problem,
    cells_on,
    describe_run,
    format_number,
    format_tokens,
    format_us,
    markdown_table,
    mixed_lengths,
    positive,
    print_table,
    summarize,
    with_progress,
)
from peers import Inputs, Peer, Unsuitable
from pictures import FLOOR, OURS

from etap_rt import EtapError, mla_decode

# Norm of the difference to our output over the norm of our output. Those who round scores to bfloat16 come to 0.5e-2.
ACCEPTED_DIFFERENCE = 2e-2
ROOFLINE_GPU = "H200"
PARTS_OF_THE_GPU = (64, 48, 32, 24)  # SMs: fewer and fewer tensor cores for the same memory
ROOFLINE_GROUPS = ("heads", "queries")

# What the README shows of each group.
README_COLUMNS: dict[str, tuple[str, ...]] = {
    "lengths": ("512", "2K", "8K", "32K", "64K"),
    "heads": ("16 heads", "64 heads", "128 heads"),
    "queries": ("s_q=2", "s_q=4"),
    "mixed": ("seed 1", "seed 2", "seed 3"),
    "fp16": (),
    "sms": ("64 SMs", "32 SMs"),
}
README_WITHOUT = ("CuPy",)

# ---- What is measured ------------------------------------------------------------------------------------------------


def all_cells() -> list[Cell]:
    """The paper's grid, one request, query rows by heads and by tokens, mixed lengths, float16, and few SMs."""
    cells = [
        Cell("lengths", f"b={batch}", format_tokens(tokens), None, (tokens,) * batch)
        for batch in (1, 16, 32)
        for tokens in TOKENS
    ]
    cells += [
        Cell("heads", "b=128 4K", f"{heads} heads", None, (4 * K,) * 128, heads) for heads in (8, 16, 32, 64, 128)
    ]
    cells += [Cell("queries", "b=32 8K", f"s_q={s_q}", None, (8 * K,) * 32, s_q=s_q) for s_q in (1, 2, 3, 4)]
    cells += [Cell("mixed", "b=32 mixed lengths", f"seed {seed}", None, mixed_lengths(32, seed)) for seed in (1, 2, 3)]
    cells += [
        Cell("fp16", "b=16 float16", format_tokens(tokens), None, (tokens,) * 16, dtype="float16") for tokens in TOKENS
    ]
    cells += [Cell("sms", "b=16 16K", f"{sms} SMs", None, (16 * K,) * 16, sms=sms) for sms in PARTS_OF_THE_GPU]
    return cells


# ---- Measuring -------------------------------------------------------------------------------------------------------


def inputs_of(problem: Problem, cell: Cell) -> Inputs:
    """A problem of bench.py as the adapters take it; `out` is one of the peers' own."""
    return Inputs(
        problem.q,
        problem.cache,
        problem.block_table.contiguous(),
        problem.cache_seqlens,
        cell.lengths,
        SOFTMAX_SCALE,
        problem.out.new_empty(problem.out.shape),
    )


def difference(out: Any, ours: Any) -> float:
    """Norm of the difference over the norm of `ours`; infinite where `out` has numbers that are none."""
    distance = float((out.float() - ours.float()).norm() / ours.float().norm())
    return distance if distance == distance else float("inf")


def prepare(peer: Peer, inputs: Inputs, ours: Any) -> Callable[[], Any] | str:
    """The peer's call, once it gave our result; else why it is not timed."""
    inputs.out.fill_(float("nan"))
    try:
        call = peer.prepare(inputs)
        out = call()
        distance = difference(out, ours)
    except Unsuitable as reason:
        return str(reason)
    except Exception as error:  # other people's code; what it raises is a finding
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return call if distance <= ACCEPTED_DIFFERENCE else f"another result: {distance:.1e} away from ours"


class Measured:
    """What is known of a cell after some rounds: samples by name, and why peers have none."""

    def __init__(self) -> None:
        self.rounds: list[dict[str, list[float]]] = []
        self.skipped: dict[str, str] = {}


def sample(bench: Bench, cell: Cell, seed: int, candidates: Sequence[Peer], measured: Measured) -> None:
    """One round of a cell: ours, the floor and all peers in turns."""
    with bench.on_sms(cell.sms):
        calls = prepare_all(bench, cell, seed, candidates, measured)
        measured.rounds.append(dict(zip(calls, bench.time_gpu(list(calls.values())))))


def prepare_all(
    bench: Bench, cell: Cell, seed: int, candidates: Sequence[Peer], measured: Measured
) -> dict[str, Callable[[], Any]]:
    """The calls of a cell by name; peers that cannot be timed are noted in `measured`."""
    problem = Problem(cell, seed)
    calls: dict[str, Callable[[], Any]] = {OURS: problem.decode, FLOOR: bench.floor_call(problem)}
    ours = mla_decode(problem.q, problem.cache, problem.block_table, problem.cache_seqlens, softmax_scale=SOFTMAX_SCALE)
    for peer in candidates:
        if peer.name in measured.skipped:
            continue
        # Each has inputs with an `out` of its own: some keep what they are given until their call.
        call = prepare(peer, inputs_of(problem, cell), ours)
        if callable(call):
            calls[peer.name] = call
        else:
            measured.skipped[peer.name] = call
    return calls


def entry_of(cell: Cell, measured: Measured) -> dict[str, Any]:
    """What the result file says about a cell."""
    times: dict[str, dict[str, float]] = {}
    for name in measured.rounds[0]:
        series = [samples[name] for samples in measured.rounds if name in samples]
        us, noise = summarize(series)
        times[name] = {"us": us, "noise_us": noise, "tb_per_s": round(cell.pages * PAGE_BYTES / us / 1e6, 3)}
        if name != FLOOR:
            times[name]["tflop_per_s"] = round(cell.flop / us / 1e6, 2)
    entry: dict[str, Any] = {
        "group": cell.group,
        "row": cell.row,
        "column": cell.column,
        "batch": len(cell.lengths),
        "tokens": cell.lengths[0] if len(set(cell.lengths)) == 1 else None,
        "heads": cell.heads,
        "s_q": cell.s_q,
        "dtype": cell.dtype,
        "sms": cell.sms or None,
        "flop_per_byte": round(cell.flop / (cell.pages * PAGE_BYTES), 2),
        "times": times,
        "share_of_floor": {
            name: round(times[FLOOR]["us"] / time["us"], 4) for name, time in times.items() if name != FLOOR
        },
        "skipped": measured.skipped,
    }
    others = {name: time["us"] for name, time in times.items() if name not in (OURS, FLOOR)}
    if others:
        best = min(others, key=lambda name: others[name])
        entry["best_peer"] = best
        entry["times_as_fast_as_best_peer"] = round(others[best] / times[OURS]["us"], 4)
    return entry


def run(groups: Sequence[str], names: Sequence[str], samples: int, sms: int = 0) -> dict[str, Any]:
    """Measure; returns the result file's contents. Raises EtapError or ImportError where that is not possible."""
    from gpu_check import describe_machine, hash_sources

    start = time.monotonic()
    machine = describe_machine()
    bench = Bench(samples)
    found, missing = find_peers(names)
    for name, reason in missing.items():
        print(f"{name} is skipped: {reason}", file=sys.stderr)
    cells = [cell for cell in all_cells() if cell.group in groups]
    cells = bench.possible(cells_on(sms, cells) if sms else cells)
    measured = [Measured() for _ in cells]
    for seed in range(ROUNDS):
        for cell, so_far in zip(with_progress(cells, seed), measured):
            sample(bench, cell, seed, found, so_far)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "sources_sha256": hash_sources(),
        **machine,
        "sms_used": sms or machine["sms"],
        "samples": samples,
        "rounds": ROUNDS,
        "peers": {peer.name: peer.version() for peer in found},
        "skipped_peers": missing,
        "cells": {cell.name: entry_of(cell, so_far) for cell, so_far in zip(cells, measured)},
        "seconds": round(time.monotonic() - start, 1),
    }


def find_peers(names: Sequence[str] = ()) -> tuple[list[Peer], dict[str, str]]:
    """The adapters that can be tried here, all or those named, and why the others cannot."""
    wanted = [peer for peer in peers.all_peers() if not names or peer.name in names]
    reasons = {peer.name: peer.available() for peer in wanted}
    found = [peer for peer in wanted if not reasons[peer.name]]
    return found, {name: reason for name, reason in reasons.items() if reason}


# ---- Showing ---------------------------------------------------------------------------------------------------------


def print_results(results: Mapping[str, Any]) -> None:
    """A table of times in us, with the ratio of the best peer's time to ours."""
    versions = ", ".join(f"{name} ({version})" for name, version in results["peers"].items())
    print(f"{describe_run(results)}.\nPeers: {versions or 'none'}. Times in us.")
    entries = results["cells"]
    columns = columns_of(results)
    headings = ("call", *columns, "of floor", "TB/s", "TFLOP/s", "best peer / ours")
    rows = []
    for name, entry in entries.items():
        times, ours = entry["times"], entry["times"][OURS]
        cells = [format_us(times[column]["us"]) if column in times else "-" for column in columns]
        share = f"{entry['share_of_floor'][OURS]:.0%}"
        ratio = format_number(entry.get("times_as_fast_as_best_peer"), 2)
        rows.append([name, *cells, share, f"{ours['tb_per_s']:.2f}", f"{ours['tflop_per_s']:.1f}", ratio])
    print_table(headings, rows)
    for name, reason in results["skipped_peers"].items():
        print(f"{name} was skipped: {reason}")
    for reason, where in reasons_of(entries).items():
        print(f"{reason} ({len(where)} calls, {where[0]} the first)")


def markdown(results: Mapping[str, Any]) -> str:
    """The README's table: some of the calls, times in us with the fastest bold, the best peer's time over ours."""
    names = [OURS, *(name for name in columns_of(results) if name not in (OURS, FLOOR, *README_WITHOUT))]
    rows = []
    for call, entry in results["cells"].items():
        if entry["column"] in README_COLUMNS[entry["group"]]:
            times = [entry["times"].get(name) for name in names]
            best = min(time["us"] for time in times if time)
            texts = [format_us(time["us"]) if time else "" for time in times]
            texts = [f"**{text}**" if time and time["us"] == best else text for time, text in zip(times, texts)]
            rows.append([call, *texts, format_number(entry.get("times_as_fast_as_best_peer"), 2)])
    headings = ["", *map(short, names), "others / ours"]
    return "\n".join([f"{describe_run(results)}.", "", *markdown_table(headings, rows)])


def short(name: str) -> str:
    """A library's name without who ships it."""
    return name.partition(" (")[0]


def columns_of(results: Mapping[str, Any]) -> list[str]:
    """Ours, the peers that were timed at all, and the floor."""
    timed = {name for entry in results["cells"].values() for name in entry["times"]}
    return [OURS, *(name for name in results["peers"] if name in timed), FLOOR]


def reasons_of(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Why a peer was not timed -> the calls it was not timed in."""
    reasons: dict[str, list[str]] = {}
    for name, entry in entries.items():
        for peer, reason in entry["skipped"].items():
            reasons.setdefault(f"{peer}: {reason}", []).append(name)
    return reasons


def draw(results: Mapping[str, Any], directory: Path) -> list[Path]:
    """Throughput by length, share of the floor by length and the roofline, as PNG files; returns their paths."""
    about = describe_run(results)
    by_batch = lines_of(results)
    drawn = []
    if by_batch:
        path = directory / "throughput.png"
        title = "Throughput by length: 16 heads, one query token a request, bfloat16"
        with pictures.figure(path, title, about, columns=len(by_batch), width=4.6) as panels:
            for axes, (batch, entries) in zip(panels, by_batch.items()):
                pictures.draw_by_length(axes, rates_by_length(entries, columns_of(results)), "TFLOP/s")
                if batch == pictures.PAPER_BATCH:
                    pictures.draw_paper(axes)
                axes.set_ylim(bottom=0)
                axes.set_title(f"batch {batch}")
        drawn.append(path)
        path = directory / "share_of_floor.png"
        title = "How near to only loading the cache: the stream floor's time over that of the call"
        with pictures.figure(path, title, about, columns=len(by_batch), width=4.6) as panels:
            for axes, (batch, entries) in zip(panels, by_batch.items()):
                pictures.draw_by_length(axes, shares_by_length(entries, columns_of(results)), "% of the stream floor")
                axes.axhline(100, **pictures.style_of(FLOOR), label=FLOOR)
                axes.set_ylim(0, 108)
                axes.set_title(f"batch {batch}")
        drawn.append(path)
    return [*drawn, *draw_roofline(results, directory / "roofline.png", about)]


def lines_of(results: Mapping[str, Any]) -> dict[int, list[dict[str, Any]]]:
    """The cells of group lengths by batch, by length."""
    by_batch: dict[int, list[dict[str, Any]]] = {}
    for entry in results["cells"].values():
        if entry["group"] == "lengths":
            by_batch.setdefault(entry["batch"], []).append(entry)
    return by_batch


def rates_by_length(entries: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, dict[int, float]]:
    """TFLOP/s by name and tokens. The floor's is what a kernel as fast as the floor would reach."""
    lines: dict[str, dict[int, float]] = {name: {} for name in names}
    for entry in entries:
        flop_per_us = entry["times"][OURS]["tflop_per_s"] * entry["times"][OURS]["us"]
        for name in names:
            if name in entry["times"]:
                lines[name][entry["tokens"]] = flop_per_us / entry["times"][name]["us"]
    return lines


def shares_by_length(entries: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, dict[int, float]]:
    """The floor's time over a library's in percent, by name and tokens."""
    return {
        name: {e["tokens"]: 100 * e["share_of_floor"][name] for e in entries if name in e["share_of_floor"]}
        for name in names
    }


def draw_roofline(results: Mapping[str, Any], path: Path, about: str) -> list[Path]:
    """The calls that keep the GPU busy, by their flop per byte, below the roofs of its data sheet."""
    from roofline import DATA_SHEETS

    name = next((name for name in DATA_SHEETS if name in results["gpu"].split()), ROOFLINE_GPU)
    sheet = DATA_SHEETS[name]
    points: dict[str, dict[tuple[str, str], tuple[float, float]]] = {}
    for entry in results["cells"].values():
        if entry["group"] not in ROOFLINE_GROUPS:
            continue
        for library, figures in entry["times"].items():
            if library != FLOOR:
                points.setdefault(library, {})[entry["row"], entry["column"]] = (
                    entry["flop_per_byte"],
                    figures["tflop_per_s"],
                )
    if not points:
        return []
    title = f"Roofline: rates reached, below the roofs of the {name}'s data sheet"
    with pictures.figure(path, title, about, height=5.5, width=8.5) as (axes,):
        pictures.draw_roofline(axes, sheet.tflop_per_s, sheet.tb_per_s, points)
    return [path]


# ---- Command line ----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    groups = list(dict.fromkeys(cell.group for cell in all_cells()))
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", action="append", choices=groups, help="measure this group; may be given again")
    parser.add_argument(
        "--peer", action="append", choices=[p.name for p in peers.all_peers()], help="beside this one only"
    )
    add_library_options(parser)
    parser.add_argument("--sms", type=positive, default=0, metavar="N", help="on N SMs of the GPU (default: all)")
    parser.add_argument("--samples", type=positive, default=SAMPLES, help="of each round (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--pictures", type=Path, metavar="DIRECTORY", help="draw them there")
    parser.add_argument("--from", dest="earlier", type=Path, metavar="FILE", help="show these results, measure nothing")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="print the README's table of these results")
    options = parser.parse_args(arguments)
    if options.markdown:
        print(markdown(json.loads(options.markdown.read_text())))
        return 0
    use_libraries(options)
    if options.earlier:
        results = json.loads(options.earlier.read_text())
    else:
        try:
            results = run(options.only or groups, options.peer or (), options.samples, options.sms)
        except (EtapError, ImportError) as error:
            print(f"cannot measure here: {error}", file=sys.stderr)
            return 2
    print_results(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
        print(f"wrote {options.json}")
    for path in draw(results, options.pictures) if options.pictures else ():
        print(f"wrote {path}")
    return 0


def add_library_options(parser: argparse.ArgumentParser) -> None:
    """Options for extension libraries that are used without the package that they come from."""
    parser.add_argument("--flashmla-so", type=Path, metavar="FILE", help="vLLM's _flashmla_C.abi3.so")
    parser.add_argument("--fa3-so", type=Path, metavar="FILE", help="vLLM's _vllm_fa3_C.abi3.so")


def use_libraries(options: argparse.Namespace) -> None:
    """Let the adapters know the libraries that `add_library_options` has asked for."""
    given = {"_flashmla_C": options.flashmla_so, "_vllm_fa3_C": options.fa3_so}
    peers.libraries.update({namespace: path.absolute() for namespace, path in given.items() if path})


if __name__ == "__main__":
    sys.exit(main())
