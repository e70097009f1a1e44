"""Measure, draw and tabulate everything that the README shows of this machine's GPU.

    python tools/reproduce.py [--output DIRECTORY] [--flashmla-so FILE] [--fa3-so FILE]

Runs the tools one after the other, each as a command that is printed and can be repeated alone: bench, peer_bench (with
whatever other libraries are importable; it says why others are skipped), accuracy, trace, roofline. Their results, in
files named by the GPU, and pictures go to DIRECTORY (tools/results unless given), the README's tables to tables.md
there. In the end the times are compared with those that were there, or in tools/results, before. Needs a Hopper GPU,
torch and `pip install -e ".[tools]"`; takes some minutes. The exit status is 1 if a tool fails, while the others run
all the same, and 2 without a GPU.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
sys.path.insert(0, str(TOOLS.parent))

from etap_rt import EtapError, driver  # noqa: E402

RESULTS = TOOLS / "results"
FILES = {"bench": "{gpu}.json", "peer_bench": "{gpu}_peers.json", "accuracy": "{gpu}_accuracy.json"}
TRACES = {"trace_b1_8k": (1, 8192), "trace_b16_4k": (16, 4096)}


def gpu_of_this_machine() -> str:
    """What result files here are named by: h100 for "NVIDIA H100 80GB HBM3". Raises EtapError without a GPU."""
    words = driver.device_name(0).lower().split()
    return next((word for word in words if re.fullmatch(r"[a-z]+\d+", word)), "gpu")


def result_files(output: Path, gpu: str) -> dict[str, str]:
    """Where each tool's results of a GPU go."""
    return {tool: str(output / name.format(gpu=gpu)) for tool, name in FILES.items()}


def measurements(output: Path, gpu: str, libraries: Sequence[str]) -> list[list[str]]:
    """The commands, as tool and arguments, that measure and draw. `libraries` are options for other libraries."""
    files = result_files(output, gpu)
    commands = [
        ["bench", "--json", files["bench"]],
        ["peer_bench", *libraries, "--json", files["peer_bench"], "--pictures", f"{output}"],
        ["accuracy", "--peers", *libraries, "--json", files["accuracy"], "--picture", f"{output}/accuracy.png"],
    ]
    for name, (batch, tokens) in TRACES.items():
        record, picture = f"{output / name}.json", f"{output / name}.png"
        commands.append(
            ["trace", "--batch", f"{batch}", "--tokens", f"{tokens}", "--json", record, "--picture", picture]
        )
    commands.append(["roofline", "--results", files["bench"], "--picture", f"{output}/projections.png"])
    return commands


def run(tool: str, *arguments: str, capture: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a tool as a program; with `capture` its output is kept rather than shown."""
    command = [sys.executable, str(TOOLS / f"{tool}.py"), *arguments]
    if not capture:
        print(f"\n$ {shlex.join(command)}", flush=True)
    return subprocess.run(command, stdout=subprocess.PIPE if capture else None, text=True)


def write_tables(output: Path, gpu: str) -> list[str]:
    """The README's tables of what was measured, in tables.md; returns the tools whose table could not be made."""
    files = result_files(output, gpu)
    done = {tool: run(tool, "--markdown", file, capture=True) for tool, file in files.items()}
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
    try:
        gpu = gpu_of_this_machine()
    except EtapError as error:
        print(f"cannot measure here: {error}", file=sys.stderr)
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    bench = Path(result_files(options.output, gpu)["bench"])
    before = bench if bench.exists() else RESULTS / bench.name
    earlier = before.read_text() if before.exists() else ""

    failed = [command[0] for command in measurements(options.output, gpu, libraries) if run(*command).returncode]
    failed += write_tables(options.output, gpu)
    if earlier and "bench" not in failed:
        old = options.output / "before.json"
        old.write_text(earlier)
        run("bench", "--compare", str(old), str(bench))
        old.unlink()
    print(f"failed: {', '.join(failed)}" if failed else f"everything is in {options.output}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
