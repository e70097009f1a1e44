"""How far mla_decode is from the exact result, beside what merely rounding the exact result costs.

    python tools/accuracy.py [--device gpu | cpu] [--tokens N ...] [--batch N ...] [--dtype NAME ...] [--peers]
                             [--flashmla-so FILE] [--fa3-so FILE] [--json FILE] [--picture FILE]
    python tools/accuracy.py --from FILE [--picture FILE]
    python tools/accuracy.py --markdown FILE

Exact is the softmax in float64 over the same bfloat16 or float16 numbers, computed where they are. Three figures for
each call: rmse, the largest error, and the relative one, the norm of the error over the norm of the exact result.
`rounding` is the rmse of the exact result rounded to the output's type: nobody who returns that type gets below it.

Inputs are normal numbers, or normal with outliers: 1 in 1000 is ten times as large. Over how many lanes a request is
divided follows from batch and length; with more lanes there is more merging. `--markdown` prints the README's table.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pictures
from bench import (
    CACHE_DIM,
    LATENT_DIM,
    PAGE_SIZE,
    SOFTMAX_SCALE,
    K,
    describe_run,
    format_tokens,
    markdown_table,
    pages_of,
    positive,
    print_table,
)
from peer_bench import README_WITHOUT, add_library_options, find_peers, short, use_libraries
from peers import Inputs, Peer, Unsuitable
from pictures import OURS

from etap_rt import EtapError, UnsupportedError, driver, mla_decode
from etap_rt.reference import SM_COUNT, decode_float64
from etap_rt.schedule import divide, plan_grid

HEADS = 16
DTYPES = ("float16", "bfloat16")
KIND_NAMES = {"normal": "normal inputs", "outliers": "inputs with outliers"}
KINDS = tuple(KIND_NAMES)
OUTLIER_SHARE, OUTLIER_FACTOR = 1e-3, 10
TOKENS_ON_GPU = tuple(512 << i for i in range(9))
TOKENS_ON_CPU = (512, 1 * K, 2 * K, 4 * K)
BATCHES_ON_GPU, BATCHES_ON_CPU = (1, 16, 132), (1, 16)
COMPARED_REQUESTS = 16  # of larger batches: the first, the last and some between
CHUNK_TOKENS = 16 * K  # whose float64 keys are in memory at the same time
# What is asked of float16 with normal inputs, at those lengths: rmse over that of rounding.
README_TOKENS = (512, 4 * K, 64 * K)
GOALS = {4 * K: 1.10, 64 * K: 1.02}
SCALE = (0.98, 1.5)  # of the picture, which is about those who come near

Device = Literal["gpu", "cpu"]


@dataclass(frozen=True)
class Case:
    """One call to judge."""

    dtype: str
    kind: str
    batch: int
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.dtype}, {self.kind}, b={self.batch}, {format_tokens(self.tokens)}"

    def splits(self, sms: int) -> int:
        """Lanes that share the first request on a GPU with `sms` SMs."""
        lanes = divide((self.tokens,) * self.batch, plan_grid(HEADS, sms))
        first = next(segment for lane in lanes for segment in lane if segment.request == 0)
        return first.last_lane - first.first_lane + 1


@dataclass(frozen=True)
class Errors:
    """Of an output against the exact one."""

    rmse: float
    largest: float
    relative: float


# ---- Numbers ---------------------------------------------------------------------------------------------------------


def compared_requests(batch: int) -> list[int]:
    """Which requests of a batch are held against the exact result."""
    count = min(batch, COMPARED_REQUESTS)
    return sorted({round(i * (batch - 1) / max(1, count - 1)) for i in range(count)})


def errors_of(squares: float, largest: float, exact_squares: float, count: int) -> Errors:
    return Errors(math.sqrt(squares / count), largest, math.sqrt(squares / exact_squares))


class OnCpu:
    """Cases in NumPy arrays, computed by the CPU backend, which is the kernel's algorithm on SM_COUNT SMs."""

    name = "CPU backend"
    sms = SM_COUNT
    library_inputs = None

    def make(self, case: Case, seed: int) -> None:
        import ml_dtypes

        rng = np.random.default_rng(seed)
        self.dtype = np.dtype(ml_dtypes.bfloat16 if case.dtype == "bfloat16" else np.float16)

        def numbers(*shape: int) -> Any:
            values = rng.standard_normal(shape, np.float32)
            if case.kind == "outliers":
                values[rng.random(shape) < OUTLIER_SHARE] *= OUTLIER_FACTOR
            return values.astype(self.dtype)

        pages = pages_of(case.tokens)
        self.q = numbers(case.batch, 1, HEADS, CACHE_DIM)
        self.cache = numbers(case.batch * pages, PAGE_SIZE, CACHE_DIM)
        self.table = rng.permutation(case.batch * pages).astype(np.int32).reshape(case.batch, pages)
        self.lengths = np.full(case.batch, case.tokens, np.int32)

    def decode(self) -> Any:
        return mla_decode(self.q, self.cache, self.table, self.lengths, softmax_scale=SOFTMAX_SCALE)

    def exact(self, requests: Sequence[int]) -> Any:
        chosen = list(requests)
        out, _ = decode_float64(
            self.q[chosen], self.cache, self.table[chosen], self.lengths[chosen], SOFTMAX_SCALE, True
        )
        return out

    def round(self, exact: Any) -> Any:
        return exact.astype(self.dtype)

    def compare(self, out: Any, exact: Any) -> Errors:
        error = np.asarray(out, np.float64) - exact
        return errors_of(
            float(np.square(error).sum()), float(np.abs(error).max()), float(np.square(exact).sum()), exact.size
        )


class OnGpu:
    """Cases in torch tensors on the GPU; the exact result is computed there too, in float64."""

    def __init__(self) -> None:
        import torch

        if not torch.cuda.is_available():
            raise UnsupportedError("torch cannot use the GPU", "a torch build for CUDA, or --device cpu")
        self.device = "cuda"
        number = torch.cuda.current_device()
        self.name = driver.device_name(number)
        self.sms = driver.sm_count(number)

    def make(self, case: Case, seed: int) -> None:
        import torch

        generator = torch.Generator(self.device).manual_seed(seed)
        self.dtype = getattr(torch, case.dtype)

        def numbers(*shape: int) -> Any:
            values = torch.empty(shape, dtype=self.dtype, device=self.device).normal_(generator=generator)
            if case.kind == "outliers":
                for part in values.split(1 + (1 << 24) // values[0].numel()):  # masks of a part fit anywhere
                    mask = torch.rand(part.shape, generator=generator, device=self.device) < OUTLIER_SHARE
                    part[mask] *= OUTLIER_FACTOR
            return values

        pages = pages_of(case.tokens)
        self.q = numbers(case.batch, 1, HEADS, CACHE_DIM)
        self.cache = numbers(case.batch * pages, PAGE_SIZE, CACHE_DIM)
        order = torch.randperm(case.batch * pages, generator=generator, device=self.device)
        self.table = order.int().view(case.batch, pages)
        self.host_lengths = (case.tokens,) * case.batch
        self.lengths = torch.tensor(self.host_lengths, dtype=torch.int32, device=self.device)

    def decode(self) -> Any:
        return mla_decode(self.q, self.cache, self.table, self.lengths, softmax_scale=SOFTMAX_SCALE)

    @property
    def library_inputs(self) -> Inputs:
        """The case as the adapters of other libraries take it."""
        out = self.q.new_empty(*self.q.shape[:-1], LATENT_DIM)
        return Inputs(self.q, self.cache, self.table, self.lengths, self.host_lengths, SOFTMAX_SCALE, out)

    def exact(self, requests: Sequence[int]) -> Any:
        """Softmax in float64 with the chunks' results merged by their largest scores; (requests, 1, heads, latent)."""
        import torch

        results = []
        for request in requests:
            q = self.q[request, 0].double()
            top = torch.full((HEADS, 1), -math.inf, dtype=torch.float64, device=self.device)
            total = torch.zeros_like(top)
            out = torch.zeros(HEADS, LATENT_DIM, dtype=torch.float64, device=self.device)
            for pages in self.table[request].split(CHUNK_TOKENS // PAGE_SIZE):
                # Every case fills its last page, so all keys of a page exist.
                keys = self.cache[pages.long()].view(-1, CACHE_DIM).double()
                scores = SOFTMAX_SCALE * (q @ keys.T)
                new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
                weights, factor = (scores - new_top).exp(), (top - new_top).exp()
                total = factor * total + weights.sum(-1, keepdim=True)
                out = factor * out + weights @ keys[:, :LATENT_DIM]
                top = new_top
            results.append((out / total)[None])
        return torch.stack(results)

    def round(self, exact: Any) -> Any:
        return exact.to(self.dtype)

    def compare(self, out: Any, exact: Any) -> Errors:
        error = out.double() - exact
        return errors_of(
            float(error.square().sum()), float(error.abs().max()), float(exact.square().sum()), exact.numel()
        )


# ---- Measuring -------------------------------------------------------------------------------------------------------


def judge(place: OnCpu | OnGpu, case: Case, candidates: Sequence[Peer], seed: int) -> dict[str, Any]:
    """What the result file says about a case."""
    place.make(case, seed)
    requests = compared_requests(case.batch)
    exact = place.exact(requests)
    rounding = place.compare(place.round(exact), exact)
    found: dict[str, Errors] = {OURS: place.compare(place.decode()[requests], exact)}
    skipped = {}
    for peer in candidates:
        inputs = place.library_inputs
        assert inputs is not None  # peers are only asked for on the GPU
        try:
            call: Callable[[], Any] = peer.prepare(inputs)
            found[peer.name] = place.compare(call()[requests], exact)
        except Unsuitable as reason:
            skipped[peer.name] = str(reason)
        except Exception as error:  # other people's code; what it raises is a finding
            skipped[peer.name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    entry: dict[str, Any] = {
        "dtype": case.dtype,
        "inputs": case.kind,
        "batch": case.batch,
        "tokens": case.tokens,
        "splits": case.splits(place.sms),
        "rounding": {"rmse": rounding.rmse, "max": rounding.largest, "relative": rounding.relative},
        "errors": {
            name: {
                "rmse": errors.rmse,
                "max": errors.largest,
                "relative": errors.relative,
                "rmse_over_rounding": round(errors.rmse / rounding.rmse, 4),
            }
            for name, errors in found.items()
        },
        "skipped": skipped,
    }
    goal = GOALS.get(case.tokens) if (case.dtype, case.kind) == ("float16", "normal") else None
    if goal:
        entry["goal"] = goal
        entry["met"] = entry["errors"][OURS]["rmse_over_rounding"] <= goal
    return entry


def all_cases(dtypes: Sequence[str], batches: Sequence[int], tokens: Sequence[int]) -> Iterator[Case]:
    for dtype in dtypes:
        for kind in KINDS:
            for batch in batches:
                for length in tokens:
                    yield Case(dtype, kind, batch, length)


def run(device: Device, cases: Sequence[Case], with_peers: bool) -> dict[str, Any]:
    """Judge all cases; returns the result file's contents. Raises EtapError or ImportError where that cannot be."""
    from gpu_check import describe_machine, hash_sources

    place = OnCpu() if device == "cpu" else OnGpu()
    machine = {} if device == "cpu" else describe_machine()
    candidates, missing = find_peers() if with_peers else ([], {})
    entries = {}
    for number, case in enumerate(cases, 1):
        if sys.stderr.isatty():
            print(f"\r\033[K{number} of {len(cases)}: {case.name}", end="", file=sys.stderr, flush=True)
        entries[case.name] = judge(place, case, candidates, seed=number)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "sources_sha256": hash_sources(),
        "device": place.name,
        **machine,
        "heads": HEADS,
        "peers": {peer.name: peer.version() for peer in candidates},
        "skipped_peers": missing,
        "cases": entries,
    }


# ---- Showing ---------------------------------------------------------------------------------------------------------


def print_results(results: Mapping[str, Any]) -> None:
    """A line a case; other libraries by their rmse over that of rounding."""
    print(f"{describe(results)}. rmse over that of rounding the exact result alone (1 is the best possible):")
    names = [name for name in results["peers"] if any(name in entry["errors"] for entry in results["cases"].values())]
    rows = []
    for name, entry in results["cases"].items():
        ours = entry["errors"][OURS]
        others = [entry["errors"].get(other) for other in names]
        rows.append(
            [
                name,
                str(entry["splits"]),
                f"{ours['rmse']:.2e}",
                f"{entry['rounding']['rmse']:.2e}",
                f"{ours['rmse_over_rounding']:.3f}",
                *(f"{other['rmse_over_rounding']:.3f}" if other else "-" for other in others),
                f"{ours['max']:.1e}",
                f"{ours['relative']:.1e}",
                {True: "yes", False: "NO", None: ""}[entry.get("met")],
            ]
        )
    print_table(("case", "splits", "rmse", "rounding", OURS, *names, "max", "relative", "goal met"), rows)
    worse = worse_than_a_peer(results)
    if results["peers"]:
        print(
            f"above a peer's rmse in {len(worse)} of {len(results['cases'])} cases" + "".join(f"\n  {w}" for w in worse)
        )
    for name, reason in results["skipped_peers"].items():
        print(f"{name} was skipped: {reason}")


def markdown(results: Mapping[str, Any]) -> str:
    """The README's table: some lengths with normal inputs, errors over that of rounding."""
    names = [OURS, *(name for name in results["peers"] if name not in README_WITHOUT)]
    rows = []
    for entry in results["cases"].values():
        if entry["inputs"] == "normal" and entry["tokens"] in README_TOKENS:
            call = f"{entry['dtype']}, b={entry['batch']}, {format_tokens(entry['tokens'])}"
            errors = [entry["errors"].get(name) for name in names]
            over = [f"{error['rmse_over_rounding']:.3f}" if error else "" for error in errors]
            rows.append([call, str(entry["splits"]), *over])
    return "\n".join([f"{describe(results)}.", "", *markdown_table(["", "parts", *map(short, names)], rows)])


def worse_than_a_peer(results: Mapping[str, Any]) -> list[str]:
    """The cases in which another library's rmse is below ours."""
    worse = []
    for name, entry in results["cases"].items():
        ours = entry["errors"][OURS]["rmse"]
        better = [other for other, errors in entry["errors"].items() if errors["rmse"] < ours]
        if better:
            worse.append(f"{name}: {', '.join(better)}")
    return worse


def describe(results: Mapping[str, Any]) -> str:
    if "gpu" in results:
        return describe_run(results)
    return f"{results['device']}, {results['date'][:10]}, sources {results['sources_sha256'][:12]}"


def draw(results: Mapping[str, Any], path: Path) -> None:
    """rmse over that of rounding by length: a panel for each type, kind of inputs and batch, a line a library.

    Lines that leave the scale are cut off there, and a note says how far they go.
    """
    panels: dict[tuple[str, str], dict[int, dict[str, dict[int, float]]]] = {}
    for entry in results["cases"].values():
        lines = panels.setdefault((entry["dtype"], entry["inputs"]), {}).setdefault(entry["batch"], {})
        for name, errors in entry["errors"].items():
            lines.setdefault(name, {})[entry["tokens"]] = errors["rmse_over_rounding"]
    columns = max(map(len, panels.values()))
    title = "Error of the output: rmse over that of merely rounding the exact result (1 is the best possible)"
    with pictures.figure(
        path, title, describe(results), len(panels), columns, height=2.3, width=4.2, sharey=True
    ) as axes_of_panels:
        rows = [axes_of_panels[start : start + columns] for start in range(0, len(axes_of_panels), columns)]
        for row, ((dtype, kind), by_batch) in zip(rows, panels.items()):
            for axes, (batch, lines) in zip(row, by_batch.items()):
                pictures.draw_by_length(axes, lines, "" if axes is not row[0] else "rmse over rounding's")
                axes.set_title(f"{dtype}, {KIND_NAMES[kind]}, batch {batch}")
                axes.axhline(1, color="black", linewidth=0.8)
                axes.set_ylim(SCALE)
                if row is not rows[-1]:
                    axes.set_xlabel("")
                note = note_off_scale(lines)
                axes.text(0.5, 0.97, note, transform=axes.transAxes, ha="center", va="top", fontsize=8)


def note_off_scale(lines: Mapping[str, Mapping[int, float]]) -> str:
    """Which lines leave the scale, and what their largest value is."""
    largest = {name: max(line.values()) for name, line in lines.items() if line}
    far = [f"{name} up to {value:.1f}" for name, value in largest.items() if value > SCALE[1]]
    return f"off the scale: {', '.join(far)}" if far else ""


# ---- Command line ----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu", help="default: %(default)s")
    parser.add_argument(
        "--tokens",
        type=positive,
        action="append",
        help="a length; may be given again (default: 512 ... 128K; CPU: ... 4K)",
    )
    parser.add_argument(
        "--batch", type=positive, action="append", help="may be given again (default: 1 16 132; CPU: 1 16)"
    )
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="may be given again (default: both)")
    parser.add_argument("--peers", action="store_true", help="other libraries on the same inputs too")
    add_library_options(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw them there")
    parser.add_argument("--from", dest="earlier", type=Path, metavar="FILE", help="show these results, compute nothing")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="print the README's table of these results")
    options = parser.parse_args(arguments)
    if options.markdown:
        print(markdown(json.loads(options.markdown.read_text())))
        return 0
    if options.peers and options.device == "cpu":
        parser.error("other libraries need the GPU")
    use_libraries(options)
    if options.earlier:
        results = json.loads(options.earlier.read_text())
    else:
        on_cpu = options.device == "cpu"
        tokens = options.tokens or (TOKENS_ON_CPU if on_cpu else TOKENS_ON_GPU)
        if any(count % PAGE_SIZE for count in tokens):
            parser.error(f"lengths are multiples of {PAGE_SIZE}")
        batches = options.batch or (BATCHES_ON_CPU if on_cpu else BATCHES_ON_GPU)
        try:
            results = run(options.device, list(all_cases(options.dtype or DTYPES, batches, tokens)), options.peers)
        except (EtapError, ImportError) as error:
            print(f"cannot measure here: {error}", file=sys.stderr)
            return 2
    print_results(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
        print(f"wrote {options.json}")
    if options.picture:
        draw(results, options.picture)
        print(f"wrote {options.picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
