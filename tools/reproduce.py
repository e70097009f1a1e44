"""Measure, draw and tabulate everything that the README shows of this machine's GPU.

    python tools/reproduce.py [--output DIRECTORY] [--flashmla-so FILE] [--fa3-so FILE]

Runs the tools one after the other, each as a command that is printed and can be repeated alone: bench, peer_bench (with
whatever other libraries are importable; it says why others are skipped), accuracy, trace, roofline. Their results and
pictures go to DIRECTORY (tools/results unless given), the README's tables to tables.md there. In the end the times are
compared with those that were there, or in tools/results, before. Needs a Hopper GPU, torch and
`pip install -e ".[tools]"`; takes some minutes. The exit status is 1 if a tool fails; the others run all the same.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
RESULTS = TOOLS / "results"
BENCH, PEERS, ACCURACY = "h200.json", "h200_peers.json", "h200_accuracy.json"
TABLES = {"bench": BENCH, "peer_bench": PEERS, "accuracy": ACCURACY}
TRACES = {"trace_b1_8k": (1, 8192), "trace_b16_4k": (16, 4096)}


def measurements(output: Path, libraries: Sequence[str]) -> list[list[str]]:
    """The commands, as tool and arguments, that measure and draw. `libraries` are options for other libraries."""
    commands = [
        ["bench", "--json", f"{output / BENCH}"],
        ["peer_bench", *libraries, "--json", f"{output / PEERS}", "--pictures", f"{output}"],
        ["accuracy", "--peers", *libraries, "--json", f"{output / ACCURACY}", "--picture", f"{output}/accuracy.png"],
    ]
    for name, (batch, tokens) in TRACES.items():
        record, picture = f"{output / name}.json", f"{output / name}.png"
        commands.append(
            ["trace", "--batch", f"{batch}", "--tokens", f"{tokens}", "--json", record, "--picture", picture]
        )
    commands.append(["roofline", "--results", f"{output / BENCH}", "--picture", f"{output}/projections.png"])
    return commands


def run(tool: str, *arguments: str, capture: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a tool as a program; with `capture` its output is kept rather than shown."""
    command = [sys.executable, str(TOOLS / f"{tool}.py"), *arguments]
    if not capture:
        print(f"\n$ {shlex.join(command)}", flush=True)
    return subprocess.run(command, stdout=subprocess.PIPE if capture else None, text=True)


def write_tables(output: Path) -> list[str]:
    """The README's tables of what was measured, in tables.md; returns the tools whose table could not be made."""
    done = {tool: run(tool, "--markdown", str(output / name), capture=True) for tool, name in TABLES.items()}
    good = {tool: table.stdout for tool, table in done.items() if not table.returncode}
    (output / "tables.md").write_text("\n".join(good.values()))
    print(f"wrote {output / 'tables.md'}")
    return [tool for tool in done if tool not in good]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIRECTORY", help="default: %(default)s")
    parser.add_argument("--flashmla-so", metavar="FILE", help="vLLM's _flashmla_C.abi3.so, of an unpacked wheel")
    parser.add_argument("--fa3-so", metavar="FILE", help="vLLM's _vllm_fa3_C.abi3.so, likewise")
    options = parser.parse_args(arguments)
    given = {"--flashmla-so": options.flashmla_so, "--fa3-so": options.fa3_so}
    libraries = [text for option, file in given.items() if file for text in (option, file)]
    options.output.mkdir(parents=True, exist_ok=True)
    before = (options.output if (options.output / BENCH).exists() else RESULTS) / BENCH
    earlier = before.read_text() if before.exists() else ""

    failed = [command[0] for command in measurements(options.output, libraries) if run(*command).returncode]
    failed += write_tables(options.output)
    if earlier and "bench" not in failed:
        old = options.output / "before.json"
        old.write_text(earlier)
        run("bench", "--compare", str(old), str(options.output / BENCH))
        old.unlink()
    print(f"failed: {', '.join(failed)}" if failed else f"everything is in {options.output}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
