"""The command line: python -m etap_rt demo | doctor | compile | cache, for people or, with --json, for programs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from etap_rt import compiler, demo, doctor
from etap_rt.errors import EtapError
from etap_rt.kernels import all_specs

if TYPE_CHECKING:
    from rich.console import Console

PIPE_WIDTH = 180  # columns of a table that does not go to a terminal
STATE_STYLES = {"ok": "green", "missing": "red", "note": "yellow"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status: 0 if all is well, 1 if not, 2 for arguments that are not understood."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except (EtapError, OSError) as error:
        print(f"etap-rt: {error}", file=sys.stderr)
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser = argparse.ArgumentParser(prog="etap-rt", description="Transposed MLA decode attention on Hopper GPUs.")
    verbs = parser.add_subparsers(required=True, metavar="demo | doctor | compile | cache")

    def verb(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, parents=[common], help=text, description=text)
        added.set_defaults(run=run)
        return added

    verb("demo", _demo, "Fill a paged cache, decode, compare with float64, measure; on the GPU if there is one.")
    verb("doctor", _doctor, "Say what works here and what is missing. Exit status 1 if the GPU cannot decode.")
    building = verb("compile", _compile, "Build all kernels into the disk cache ahead of use, with a GPU or without.")
    building.add_argument("--arch", default=compiler.ARCH, choices=[compiler.ARCH], help="architecture to build for")
    building.add_argument("--report", action="store_true", help="add registers, spills, shared memory, wgmma counts")
    caching = verb("cache", _cache, "Say where compiled kernels are kept and which ones are there.")
    caching.add_argument("--clear", action="store_true", help="delete them")
    return parser


def _demo(options: argparse.Namespace) -> int:
    with _progress() as step:
        result = demo.run(step)
    if options.json:
        _print_json(_demo_as_json(result))
    else:
        print("\n".join(_demo_as_lines(result)))
    return 0 if result.accuracy.accepted else 1


def _demo_as_json(result: demo.Demo) -> dict[str, Any]:
    return {
        "device": result.device,
        "no_gpu": result.no_gpu or None,
        "library": result.library,
        "dtype": "bfloat16",
        "heads": demo.HEADS,
        "dims": [demo.LATENT_DIM, demo.ROPE_DIM],
        "page_size": demo.PAGE_SIZE,
        "lengths": result.lengths,
        "error": result.accuracy.error,
        "accepted_error": demo.ACCEPTED_ERROR,
        "lse_error": result.accuracy.lse_error,
        "accepted_lse_error": demo.ACCEPTED_LSE_ERROR,
        "accepted": result.accuracy.accepted,
        "times_us": result.times_us,
        "median_us": result.time_us,
        "tb_per_s": result.tb_per_s,
        "tflop_per_s": result.tflop_per_s,
        "compiled": [str(compiled.spec) for compiled in result.kernels],
        "not_compiled": result.no_kernels or None,
    }


def _demo_as_lines(result: demo.Demo) -> Iterator[str]:
    accuracy = result.accuracy
    if result.no_gpu:
        yield f"No GPU that can run the kernels: {result.no_gpu}."
        yield "So this ran on the CPU backend, with fewer tokens."
    yield (
        f"Decoded {len(result.lengths)} requests of {result.lengths[0]:,} to {result.lengths[-1]:,} tokens "
        f"({result.tokens:,} in all), {demo.HEADS} heads, dims {demo.LATENT_DIM} + {demo.ROPE_DIM}, bfloat16"
    )
    yield f"on {result.device}, with arrays of {result.library}."
    yield ""
    yield f"  error       {accuracy.error:.2e} of the output's size (accepted: {demo.ACCEPTED_ERROR:.0e})"
    yield f"  lse error   {accuracy.lse_error:.2e} (accepted: {demo.ACCEPTED_LSE_ERROR:.0e})"
    runs = f"median of {len(result.times_us)} ({min(result.times_us):,.1f} to {max(result.times_us):,.1f})"
    yield f"  time        {result.time_us:,.1f} us a call, {runs}" + ("" if result.no_gpu else ", L2 cache cleaned")
    factor, prefix = (1e3, "G") if result.no_gpu else (1, "T")
    yield f"  memory      {result.tb_per_s * factor:.3g} {prefix}B/s of cache read"
    yield f"  arithmetic  {result.tflop_per_s * factor:.3g} {prefix}FLOP/s"
    yield ""
    if result.kernels:
        yield f"Compiled {len(result.kernels)} decode kernels for {compiler.ARCH}, ready for a machine with a GPU."
    if result.no_kernels:
        yield f"Compiled no kernels: {result.no_kernels}."
    yield "In tolerance of the float64 result." if accuracy.accepted else "OUT OF TOLERANCE of the float64 result."


def _doctor(options: argparse.Namespace) -> int:
    with _progress() as step:
        findings = doctor.examine(step)
    works = doctor.gpu_works(findings)
    if options.json:
        _print_json(
            {
                "gpu_decode": works,
                "findings": [
                    {"name": f.name, "state": f.state, "text": f.text, "required": f.required} for f in findings
                ],
            }
        )
        return 0 if works else 1
    console, table = _console(), _table()
    for finding in findings:
        style = STATE_STYLES[finding.state]
        table.add_row(f"[{style}]{finding.state}[/]", finding.name, _escape(finding.text))
    console.print(table)
    console.print(f"Decode on the GPU {'works' if works else 'does not work'} here.")
    return 0 if works else 1


def _compile(options: argparse.Namespace) -> int:
    specs = all_specs()
    with _progress() as step:
        done: list[compiler.Compiled] = []

        def finished(compiled: compiler.Compiled) -> None:
            done.append(compiled)
            step(f"{len(done)} of {len(specs)} kernels")

        step(f"compiling {len(specs)} kernels")
        kernels = compiler.compile_specs(specs, options.arch, finished)
    if options.json:
        _print_json({"kernels": [_compiled_as_json(compiled, options.report) for compiled in kernels]})
        return 0
    console = _console()
    headings = ("registers", "stack", "spilled", "shared", "wgmma")
    table = _table("kernel", "origin", "code", *(headings if options.report else ()))
    for compiled in kernels:
        origin = "disk cache" if compiled.from_cache else f"{compiled.seconds:.1f} s"
        report = _report_cells(compiler.build_report(compiled)) if options.report else ()
        table.add_row(_escape(str(compiled.spec)), origin, _size(len(compiled.cubin)), *report)
    console.print(table)
    directory = kernels[0].path.parent if kernels[0].path else None
    console.print(f"In {directory}." if directory else "Nothing was kept on disk.", markup=False)
    return 0


def _compiled_as_json(compiled: compiler.Compiled, with_report: bool) -> dict[str, Any]:
    described: dict[str, Any] = {
        "kernel": str(compiled.spec),
        "arch": compiled.arch,
        "path": str(compiled.path) if compiled.path else None,
        "bytes": len(compiled.cubin),
        "from_cache": compiled.from_cache,
        "seconds": compiled.seconds,
    }
    if with_report:
        report = compiler.build_report(compiled)
        described["report"] = {
            "registers": report.registers,
            "stack_bytes": report.stack,
            "spill_store_bytes": report.spill_stores,
            "spill_load_bytes": report.spill_loads,
            "static_shared_bytes": report.shared,
            "serialized_wgmma": report.serialized_wgmma,
            "wgmma": dict(report.wgmma),
        }
    return described


def _report_cells(report: compiler.Report) -> tuple[str, ...]:
    counts = ", ".join(f"{count} {shape}" for shape, count in report.wgmma) or "none"
    return (
        str(report.registers),
        _size(report.stack),
        _size(report.spill_stores + report.spill_loads),
        _size(report.shared),
        counts + (", serialized" if report.serialized_wgmma else ""),
    )


def _cache(options: argparse.Namespace) -> int:
    directory = compiler.cache_directory()
    cleared = compiler.clear_cache() if options.clear else None
    entries = compiler.cache_entries()
    problem = compiler.cache_problem()
    if options.json:
        kernels = [
            {"kernel": e.spec, "arch": e.arch, "path": str(e.path), "bytes": e.size_bytes, "seconds": e.seconds}
            for e in entries
        ]
        _print_json(
            {
                "directory": str(directory) if directory else None,
                "problem": problem or None,
                "deleted_files": cleared,
                "kernels": kernels,
            }
        )
        return 0
    console = _console()
    if cleared is not None:
        console.print(f"Deleted {cleared} files.")
    if entries:
        table = _table("kernel", "arch", "code", "compiled in")
        for entry in entries:
            table.add_row(_escape(entry.spec), entry.arch, _size(entry.size_bytes), f"{entry.seconds:.1f} s")
        console.print(table)
    where = f"in {directory}" if directory else "and no place for any; set " + compiler.CACHE_VARIABLE
    console.print(f"{len(entries)} kernels {where}.", markup=False)
    if problem and directory:
        console.print(f"No more can be kept: {problem}.", markup=False)
    return 0


@contextmanager
def _progress() -> Iterator[demo.Step]:
    """A line on stderr that says what is being done and that it is alive; none where stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console

    with Console(stderr=True).status("starting") as status:
        yield lambda text: status.update(_escape(text))


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2))


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else PIPE_WIDTH)


def _table(*headings: str) -> Any:
    from rich import box
    from rich.table import Table

    return Table(*headings, box=box.SIMPLE_HEAD if headings else None, show_header=bool(headings))


def _escape(text: str) -> str:
    """Text that means nothing to rich's markup: kernels are written with brackets."""
    from rich.markup import escape

    return escape(text)


def _size(size: int) -> str:
    return f"{size} B" if size < 1024 else f"{size / 1024:.1f} KiB"
