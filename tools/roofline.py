"""What a GPU's data sheet allows mla_decode, and what to expect of it by length and batch.

    python tools/roofline.py [--gpu NAME ...] [--batch N ...] [--heads N] [--s-q N] [--json FILE] [--picture FILE]
    python tools/roofline.py --gpu NAME --sms N --tflops N --tb-per-s N [--mhz N]

Everything printed for a GPU that was not measured is a projection. Nothing is run; needs no GPU.

The bound of a 64-key tile: its bytes at the GPU's memory rate against the cycles of its wgmma on one SM. A wgmma
m64nNk16 costs max(16 + N/4, N/2) cycles on an SM of full rate (measured on an H200: reading A takes 16 cycles whatever
N is), and never less than its flop at the tensor rate of the data sheet. An SM works on one tile at a time.

What to expect adds two numbers fitted to the measurements in tools/results: a constant, for starting, filling the
pipeline, merging and ending, and the share of the memory rate that is reached:

    time = constant + max(bytes / (share * memory rate), tiles of the busiest SM * tensor time of a tile)

`low` is the same with the sum in place of the maximum: what remains if loading and computing do not overlap at all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pictures
from bench import CACHE_DIM, LATENT_DIM, ROOT, TOKENS, Cell, all_cells, format_tokens, positive, print_table, sms_used

from etap_rt.schedule import TILE_KEYS, divide, plan_grid

RESULTS = ROOT / "tools" / "results" / "h200.json"  # the latest
TILE_BYTES = TILE_KEYS * CACHE_DIM * 2
WGMMA_M, WGMMA_K = 64, 16
WGMMA_PER_TILE = CACHE_DIM // WGMMA_K + LATENT_DIM // WGMMA_M * (TILE_KEYS // WGMMA_K)
FULL_RATE = 4096  # flop a cycle of an SM with all of Hopper's tensor throughput
PADDED_ROWS = 64  # query rows where they stand on wgmma's fixed side, as in FlashMLA

# ---- Data sheets -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    """A data sheet. The tensor rate is of dense bfloat16; `mhz` is the clock it is stated for."""

    name: str
    sms: int
    tflop_per_s: float
    tb_per_s: float
    mhz: float
    source: str

    @property
    def flop_per_cycle(self) -> float:
        """Of one SM."""
        return self.tflop_per_s * 1e6 / (self.sms * self.mhz)

    def tensor_us(self, rows: int) -> float:
        """Time of a tile's products on one SM, for `rows` query rows on wgmma's N side."""
        flop = 2 * WGMMA_M * WGMMA_K * rows
        cycles = max(16 + rows / 4, rows / 2, flop / self.flop_per_cycle)
        return WGMMA_PER_TILE * cycles / self.mhz

    def padded_tensor_us(self, rows: int) -> float:
        """The same with keys on the N side, 64 of them, and query rows on M, padded to 64."""
        return -(-rows // PADDED_ROWS) * self.tensor_us(TILE_KEYS)

    @property
    def memory_us(self) -> float:
        """Time in which one SM's share of the memory rate brings a tile."""
        return TILE_BYTES * self.sms / (self.tb_per_s * 1e6)


_FULL_CHIP = "989.4 TFLOP/s = 132 SMs x 4096 flop x 1.83 GHz"
DATA_SHEETS = {
    gpu.name: gpu
    for gpu in (
        Gpu("H20", 78, 148, 4.0, 1980, "NVIDIA H20 data sheet, as resellers quote it; the clock is an H200's"),
        Gpu("H100", 132, 989.4, 3.35, 1830, f"NVIDIA H100 SXM5 80 GB data sheet; {_FULL_CHIP}"),
        Gpu("H200", 132, 989.4, 4.8, 1830, f"NVIDIA H200 SXM data sheet; {_FULL_CHIP}"),
        Gpu("H800", 132, 989.4, 3.35, 1830, f"an H100 SXM5 with slower NVLink; {_FULL_CHIP}"),
    )
}

# ---- The model -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What a call asks of a GPU."""

    bytes: int  # of cache, each page once
    flop: int
    rows: int  # query rows of a tile
    busiest_tiles: int  # key tiles of the SM that has most of them


def work_of(cell: Cell, sms: int) -> Work:
    """The work of a call, divided as the kernel divides it over `sms` SMs."""
    grid = plan_grid(cell.s_q * cell.heads, sms)
    lanes = divide(cell.lengths, grid)
    busiest = max(sum(segment.tile_end - segment.tile_begin for segment in lane) for lane in lanes)
    return Work(cell.pages * TILE_BYTES, cell.flop, grid.rows, busiest)


@dataclass(frozen=True)
class Fit:
    """What the data sheet does not know."""

    constant_us: float = 0
    memory_share: float = 1


NOTHING_LOST = Fit()


@dataclass(frozen=True)
class Estimate:
    """Times of a call in us. `low_us` is how long it takes if loading and computing do not overlap."""

    us: float
    low_us: float
    bound_by: str  # "memory" or "tensor"


def estimate(gpu: Gpu, work: Work, fit: Fit = NOTHING_LOST) -> Estimate:
    memory = work.bytes / (fit.memory_share * gpu.tb_per_s * 1e6)
    tensor = work.busiest_tiles * gpu.tensor_us(work.rows)
    longer = max(memory, tensor)
    return Estimate(
        fit.constant_us + longer, fit.constant_us + memory + tensor, "memory" if memory >= tensor else "tensor"
    )


def fit_to(gpu: Gpu, measured: Sequence[tuple[Work, float]]) -> Fit:
    """The constant and the share with the least squares of relative errors; `measured`: work and us."""

    def squares(fit: Fit) -> float:
        return sum((estimate(gpu, work, fit).us / us - 1) ** 2 for work, us in measured)

    def best_with(share: float) -> Fit:
        # For a given share the squares are those of a line in the constant, with the minimum in closed form.
        rest = [(estimate(gpu, work, Fit(0, share)).us, us) for work, us in measured]
        constant = sum((1 - time / us) / us for time, us in rest) / sum(1 / us**2 for _, us in rest)
        return Fit(round(max(0.0, constant), 2), share)

    return min((best_with(percent / 100) for percent in range(50, 101)), key=squares)


# ---- Against measurements --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """One measured call beside what the model says of it."""

    name: str
    group: str
    measured_us: float
    expected_us: float

    @property
    def error(self) -> float:
        """Relative, of the expected time; negative where the model is too fast."""
        return self.expected_us / self.measured_us - 1


def measured_cells(results: Mapping[str, Any]) -> list[tuple[Cell, float]]:
    """The cells of a result file of bench.py that the model is about, with their times in us."""
    known = {cell.name: cell for cell in all_cells() if cell.group in FITTED_GROUPS + CHECKED_GROUPS}
    return [(known[name], entry["us"]) for name, entry in results["cells"].items() if name in known]


FITTED_GROUPS = ("lengths",)
CHECKED_GROUPS = ("fp16", "heads", "queries", "mixed", "sms", "compute")


def data_sheet_of(results: Mapping[str, Any]) -> Gpu | None:
    """The data sheet of a result file's GPU, such as that of "NVIDIA H100 80GB HBM3", not "NVIDIA H100 PCIe"."""
    words, sms = results["gpu"].split(), results["sms"]
    return next((gpu for gpu in DATA_SHEETS.values() if gpu.name in words and gpu.sms == sms), None)


def check_model(gpu: Gpu, measured: Sequence[tuple[Cell, float]]) -> tuple[Fit, list[Comparison]]:
    """Fit the model to the cells of FITTED_GROUPS and hold all cells against it."""
    fitted = [(work_of(cell, cell.sms or gpu.sms), us) for cell, us in measured if cell.group in FITTED_GROUPS]
    fit = fit_to(gpu, fitted)
    return fit, compare(gpu, fit, measured)


def compare(gpu: Gpu, fit: Fit, measured: Sequence[tuple[Cell, float]]) -> list[Comparison]:
    """Measured cells beside what a model says of them that was fitted to these or to another GPU's."""
    works = [(cell, work_of(cell, cell.sms or gpu.sms), us) for cell, us in measured]
    return [Comparison(cell.name, cell.group, us, round(estimate(gpu, work, fit).us, 2)) for cell, work, us in works]


def errors_by_group(comparisons: Iterable[Comparison]) -> dict[str, tuple[float, float]]:
    """By group: the median of the errors' sizes, and the error of the largest size."""
    groups: dict[str, list[float]] = {}
    for comparison in comparisons:
        groups.setdefault(comparison.group, []).append(comparison.error)
    return {group: (statistics.median(map(abs, errors)), max(errors, key=abs)) for group, errors in groups.items()}


# ---- Output ----------------------------------------------------------------------------------------------------------


def expected_cell(batch: int, tokens: int, heads: int, s_q: int) -> Cell:
    return Cell("roofline", f"b={batch}", format_tokens(tokens), None, (tokens,) * batch, heads, s_q)


def project(gpu: Gpu, fit: Fit, batch: int, heads: int, s_q: int) -> list[dict[str, Any]]:
    """An entry for each of TOKENS: bound, expected and low TFLOP/s and the expected time."""
    entries = []
    for tokens in TOKENS:
        cell = expected_cell(batch, tokens, heads, s_q)
        work = work_of(cell, gpu.sms)
        bound, expected = estimate(gpu, work), estimate(gpu, work, fit)
        rate = {name: round(work.flop / us / 1e6, 1) for name, us in rates_of(bound, expected)}
        entries.append(
            {"batch": batch, "tokens": tokens, **rate, "us": round(expected.us, 1), "bound_by": bound.bound_by}
        )
    return entries


def rates_of(bound: Estimate, expected: Estimate) -> list[tuple[str, float]]:
    return [
        ("bound_tflop_per_s", bound.us),
        ("expected_tflop_per_s", expected.us),
        ("low_tflop_per_s", expected.low_us),
    ]


def report(
    gpus: Sequence[Gpu],
    batches: Sequence[int],
    heads: int,
    s_q: int,
    measured_gpu: Gpu,
    results: Mapping[str, Any],
    others: Mapping[Gpu, Mapping[str, Any]],
) -> dict[str, Any]:
    """Everything that is printed, drawn and written; `results` are of `measured_gpu`, `others` of further GPUs."""
    rows = plan_grid(s_q * heads, gpus[0].sms).rows
    fit, comparisons = check_model(measured_gpu, measured_cells(results))
    held = {gpu: compare(gpu, fit, measured_cells(found)) for gpu, found in others.items() if gpu in gpus}
    return {
        "heads": heads,
        "s_q": s_q,
        "rows_of_a_tile": rows,
        "fit": {**asdict(fit), "to": f"{results['gpu']}, {results['date'][:10]}, group {', '.join(FITTED_GROUPS)}"},
        "errors": rounded_errors(comparisons),
        "errors_of_projections": {gpu.name: rounded_errors(found) for gpu, found in held.items()},
        "comparisons": [{**asdict(item), "error": round(item.error, 4)} for item in comparisons],
        "gpus": {
            gpu.name: {
                **asdict(gpu),
                "projection": gpu != measured_gpu,
                "tile_us": {
                    "memory": round(gpu.memory_us, 3),
                    "tensor": round(gpu.tensor_us(rows), 3),
                    "tensor, padded to 64 rows": round(gpu.padded_tensor_us(rows), 3),
                },
                "by_length": [entry for batch in batches for entry in project(gpu, fit, batch, heads, s_q)],
            }
            for gpu in gpus
        },
        **({"paper": compare_with_paper(DATA_SHEETS["H20"], fit)} if DATA_SHEETS["H20"] in gpus else {}),
    }


def rounded_errors(comparisons: Iterable[Comparison]) -> dict[str, dict[str, float]]:
    return {
        group: {"median": round(median, 4), "largest": round(largest, 4)}
        for group, (median, largest) in errors_by_group(comparisons).items()
    }


def compare_with_paper(gpu: Gpu, fit: Fit) -> list[dict[str, Any]]:
    """The paper's measurements on an H20 beside the two bounds there: transposed at 16 rows, and padded to 64."""
    entries = project(gpu, fit, pictures.PAPER_BATCH, heads=16, s_q=1)
    for index, entry in enumerate(entries):
        work = work_of(expected_cell(pictures.PAPER_BATCH, entry["tokens"], 16, 1), gpu.sms)
        tensor = work.busiest_tiles * gpu.padded_tensor_us(16)
        entry["padded_bound_tflop_per_s"] = round(work.flop / max(work.bytes / gpu.tb_per_s / 1e6, tensor) / 1e6, 1)
        for name, values in pictures.PAPER_H20.items():
            entry[name] = values[index]
    return entries


def print_report(contents: Mapping[str, Any]) -> None:
    fit = contents["fit"]
    print(
        f"{contents['heads']} heads, s_q {contents['s_q']}, {contents['rows_of_a_tile']} query rows a tile, bfloat16\n"
    )
    print_table(
        ("GPU", "SMs", "TFLOP/s", "TB/s", "tile: memory us", "tensor us", "tensor us, padded", "bound by", "source"),
        [
            [
                name,
                str(gpu["sms"]),
                f"{gpu['tflop_per_s']:g}",
                f"{gpu['tb_per_s']:g}",
                *(f"{us:.3f}" for us in gpu["tile_us"].values()),
                "memory" if gpu["tile_us"]["memory"] >= gpu["tile_us"]["tensor"] else "tensor",
                gpu["source"],
            ]
            for name, gpu in contents["gpus"].items()
        ],
    )
    print(f"\nModel: {fit['constant_us']} us + the bound at {fit['memory_share']:.0%} of the memory rate,")
    print(f"fitted to {fit['to']}. Its error, of the measured time:")
    print_errors(contents["errors"])
    held = contents["errors_of_projections"]
    for name, errors in held.items():
        print(f"Its error on the {name}, to which it was not fitted:")
        print_errors(errors)
    for name, gpu in contents["gpus"].items():
        kind = "the model; measurements are in tools/results"
        if gpu["projection"]:
            kind = "PROJECTION, held against measurements above" if name in held else "PROJECTION, nothing was measured"
        print(f"\n{name} ({kind}), TFLOP/s by tokens a request:")
        print_table(("", *map(format_tokens, TOKENS)), rate_rows(gpu["by_length"]))
    if "paper" in contents:
        print(f"\nH20, b={pictures.PAPER_BATCH}, 16 heads, TFLOP/s: PROJECTIONS beside what the paper measured there")
        fields = {
            "transposed: bound": "bound_tflop_per_s",
            "expected of etap_rt": "expected_tflop_per_s",
            "the same without overlap": "low_tflop_per_s",
            "FlashMLA-ETAP, measured": "FlashMLA-ETAP",
            "padded to 64 rows: bound": "padded_bound_tflop_per_s",
            "FlashMLA, measured": "FlashMLA",
        }
        rows = [[label, *(f"{entry[field]:.1f}" for entry in contents["paper"])] for label, field in fields.items()]
        print_table(("", *map(format_tokens, TOKENS)), rows)
        ratios = [entry["expected_tflop_per_s"] / entry["FlashMLA-ETAP"] for entry in contents["paper"]]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}, median {statistics.median(ratios):.2f}"
        print(f"expected over FlashMLA-ETAP: {spread}")


def rate_rows(entries: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Three rows a batch, a column for each of TOKENS."""
    by_batch: dict[int, list[Mapping[str, Any]]] = {}
    for entry in entries:
        by_batch.setdefault(entry["batch"], []).append(entry)
    return [
        [f"b={batch}, {name}", *(f"{entry[f'{name}_tflop_per_s']:.1f}" for entry in same)]
        for batch, same in by_batch.items()
        for name in ("bound", "expected", "low")
    ]


def draw(contents: Mapping[str, Any], path: Path, measured: Mapping[str, Sequence[tuple[Cell, float]]]) -> None:
    """A panel for each GPU: bound and expected range by length; measurements, by GPU, where there are any."""
    title = f"mla_decode by data sheet: bound and expected throughput, {contents['heads']} heads, s_q {contents['s_q']}"
    about = f"model fitted to {contents['fit']['to']}; {error_of(contents)}; shaded: down to no overlap at all"
    columns = min(2, len(contents["gpus"]))
    rows = -(-len(contents["gpus"]) // columns)
    with pictures.figure(path, title, about, rows, columns, height=3.6, width=5.2) as panels:
        for axes, (name, gpu) in zip(panels, contents["gpus"].items()):
            batches = sorted({entry["batch"] for entry in gpu["by_length"]})
            for color, batch in zip(pictures.OTHER_COLORS, batches):
                entries = [entry for entry in gpu["by_length"] if entry["batch"] == batch]
                tokens = [entry["tokens"] for entry in entries]
                bound, expected, low = (
                    [entry[field] for entry in entries]
                    for field in ("bound_tflop_per_s", "expected_tflop_per_s", "low_tflop_per_s")
                )
                axes.plot(tokens, bound, "--", color=color, linewidth=1, label=f"b={batch}, bound")
                axes.plot(tokens, expected, color=color, label=f"b={batch}, expected")
                axes.fill_between(tokens, low, expected, color=color, alpha=0.15)
                points = points_of(measured.get(name, ()), batch, contents["heads"])
                if points:
                    axes.plot(*zip(*points), "o", color=color, markersize=4, label=f"b={batch}, measured")
            if name == "H20":
                pictures.draw_paper(axes)
            kind = "PROJECTION" if gpu["projection"] else "model"
            axes.set_title(f"{name}: {kind}{' and measurements' if name in measured else ', nothing was measured'}")
            axes.set_ylabel("TFLOP/s")
            pictures.label_tokens(axes, TOKENS)
        for axes in panels[len(contents["gpus"]) :]:
            axes.set_axis_off()


def print_errors(errors: Mapping[str, Mapping[str, float]]) -> None:
    for group, error in errors.items():
        print(f"  {group}: median {error['median']:.1%}, largest {error['largest']:+.1%}")


def error_of(contents: Mapping[str, Any]) -> str:
    """The model's error where it was fitted, in words."""
    errors = [contents["errors"][group] for group in FITTED_GROUPS]
    median, largest = max(e["median"] for e in errors), max((e["largest"] for e in errors), key=abs)
    return f"its error there: median {median:.1%}, largest {largest:+.1%}"


def points_of(measured: Sequence[tuple[Cell, float]], batch: int, heads: int) -> list[tuple[int, float]]:
    """(tokens, TFLOP/s) of the measured calls of a batch."""
    return [
        (cell.lengths[0], cell.flop / us / 1e6)
        for cell, us in measured
        if cell.group == "lengths" and len(cell.lengths) == batch and cell.heads == heads
    ]


# ---- Command line ----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gpu", action="append", metavar="NAME", help=f"{', '.join(DATA_SHEETS)}, or a name of yours")
    parser.add_argument("--sms", type=positive, help="of a GPU of yours")
    parser.add_argument("--tflops", type=float, help="its dense bfloat16 TFLOP/s")
    parser.add_argument("--tb-per-s", type=float, help="its memory rate")
    parser.add_argument("--mhz", type=float, help="the clock of its tensor rate (default: where an SM has full rate)")
    parser.add_argument(
        "--batch", type=positive, action="append", help="requests; may be given again (default: 1 16 32)"
    )
    parser.add_argument("--heads", type=positive, default=16, help="query heads (default: %(default)s)")
    parser.add_argument("--s-q", type=positive, default=1, help="query tokens a request (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="measurements of bench.py (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw it there")
    options = parser.parse_args(arguments)
    results = json.loads(options.results.read_text())
    if sms_used(results) < results["sms"]:
        parser.error(f"{options.results} is about a part of a GPU's SMs")
    measured_gpu = data_sheet_of(results)
    if measured_gpu is None:
        parser.error(f"{options.results} is about {results['gpu']}, of which there is no data sheet here")
    batches = options.batch or [1, 16, 32]
    others = other_results(measured_gpu)
    contents = report(gpus_of(parser, options), batches, options.heads, options.s_q, measured_gpu, results, others)
    print_report(contents)
    if options.json:
        options.json.write_text(json.dumps(contents, indent=2) + "\n")
        print(f"wrote {options.json}")
    if options.picture:
        every = {measured_gpu: results, **others}
        draw(contents, options.picture, {gpu.name: measured_cells(found) for gpu, found in every.items()})
        print(f"wrote {options.picture}")
    return 0


def other_results(measured_gpu: Gpu) -> dict[Gpu, dict[str, Any]]:
    """What was measured on other GPUs than that, by their data sheets."""
    paths = {gpu: RESULTS.with_name(f"{gpu.name.lower()}.json") for gpu in DATA_SHEETS.values() if gpu != measured_gpu}
    return {gpu: json.loads(path.read_text()) for gpu, path in paths.items() if path.exists()}


def gpus_of(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[Gpu]:
    """The GPUs that the command line asks for; all built-in ones if it names none."""
    names = options.gpu or list(DATA_SHEETS)
    given = (options.sms, options.tflops, options.tb_per_s)
    if any(value is not None for value in given):
        if len(names) != 1 or None in given:
            parser.error("a GPU of yours needs one --gpu, --sms, --tflops and --tb-per-s")
        mhz = options.mhz or options.tflops * 1e6 / (options.sms * FULL_RATE)
        return [Gpu(names[0], *given, mhz, "given on the command line")]
    unknown = [name for name in names if name not in DATA_SHEETS]
    if unknown:
        parser.error(f"no data sheet of {', '.join(unknown)} here: give --sms, --tflops and --tb-per-s")
    return [DATA_SHEETS[name] for name in names]


if __name__ == "__main__":
    sys.exit(main())
