"""Random decode problems of every legal shape, layout and length, each held against float64, for as long as you like.

    python tools/fuzz.py [--device cuda|cpu] [--seconds N | --cases N] [--seed N] [--json]

Every array lies inside a larger buffer; what is not the array itself (space before and behind it, gaps of strides,
cache slots without a token, table entries that are not in use) is poison: NaN, or numbers far out of range. After
each call nothing but `out` and `lse` may have changed, the workspace included: its surroundings are guarded, its
counters are zero again, and its partial results are poisoned before the next call. A second run gives the same bits.

Case i of seed S is case 0 of seed S + i: what fails prints the command that repeats it alone. The exit status is 1
after a failure. Needs torch, with CUDA for --device cuda.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import green_context  # noqa: E402
import torch  # noqa: E402

from etap_rt import driver, mla_decode, plan_decode, workspace  # noqa: E402
from etap_rt.schedule import ROW_TILES  # noqa: E402
from tests.cases import DEEPSEEK_SCALE, LSE_ERROR, LSE_RELATIVE_ERROR, REQUEST_ERROR  # noqa: E402

GUARD_BYTES = 4096  # of poison, before and behind each array
NAN_BITS = 0x7FFF  # NaN in bfloat16 and float16
POISON_INTS = (2_147_480_000, -1, -(2**31), 2**31 - 1)  # lengths and table entries that nobody may follow
POISON_BYTE = 0xFF  # NaN in float32
LEVELS = (0.0, 0.0, 5.0, 14.0, 9.0)  # powers of two by which the scores of a page are raised in uneven cases
ROPE_DIM = 64
PAGE_SIZES = (1, 2, 4, 8, 16, 32, 64, 64, 64, 128, 192, 256, 1024)
FEW_SMS = 64
MOST_TOKENS = {"cuda": 120_000, "cpu": 900}  # in a cache
MOST_BATCH = {"cuda": 400, "cpu": 12}
MOST_WORK = {"cuda": 6e10, "cpu": 4e7}  # multiplications of the reference


class Failure(AssertionError):
    """A case went wrong; the message says what, which case it was and how to repeat it."""


@dataclass
class Case:
    """What was drawn; everything else follows from the seed."""

    seed: int
    dtype: str
    latent_dim: int
    heads: int
    page_size: int
    lengths: list[int]
    queries: list[int]  # tokens of each request, all the same unless ragged
    ragged: bool
    csr: bool
    causal: bool
    scale: float
    uneven: bool
    magnitude: float
    split_q: bool
    split_cache: str  # "no", "views" of one packed cache or "apart"
    cache_heads_dim: bool
    shared_prefix: bool  # requests begin with the pages of another
    spare_pages: int
    spare_columns: int
    outputs: str  # "made", "out", "lse" or "both": what is given
    planned: bool
    few_sms: bool  # decoded on a part of the GPU's SMs

    @property
    def batch(self) -> int:
        return len(self.lengths)


@dataclass
class Buffer:
    """A flat buffer of poison with an array in it, and what it held before the call."""

    name: str
    base: Any
    view: Any
    index: tuple[Any, ...]  # shape, strides, offset of the view in the base
    before: Any = None


@dataclass
class Summary:
    cases: int = 0
    runs: int = 0
    tokens: int = 0
    seconds: float = 0.0
    worst: float = 0.0  # error of a request over the accepted one
    seen: Counter[str] = field(default_factory=Counter)


class GuardedMemory:
    """Stands in for driver.allocate_zeroed, so that what the kernel does around and within its workspace is seen."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.blocks: dict[int, Any] = {}  # by address of what was asked for

    def allocate_zeroed(self, device: int, size: int) -> int:
        block = torch.full((size + 2 * GUARD_BYTES,), POISON_BYTE, dtype=torch.uint8, device=self.device)
        block[GUARD_BYTES : GUARD_BYTES + size] = 0
        if self.device == "cuda":
            torch.cuda.synchronize()  # as with the original, no stream has to wait for the zeros
        address = int(block.data_ptr()) + GUARD_BYTES
        self.blocks[address] = block
        return address

    def poison(self) -> None:
        """Whatever earlier calls left in the workspace, besides the counters, is gone."""
        counters = set(workspace._counters.values())
        for address, block in self.blocks.items():
            if address not in counters:
                block.fill_(POISON_BYTE)

    def check(self) -> None:
        counters = set(workspace._counters.values())
        for address, block in self.blocks.items():
            guards = torch.cat([block[:GUARD_BYTES], block[-GUARD_BYTES:]])
            _expect(bool((guards == POISON_BYTE).all()), "something was written beside the workspace")
            if address in counters:
                inner = block[GUARD_BYTES:-GUARD_BYTES]
                _expect(not bool(inner.any()), "a counter of the workspace is not zero after the call")


# ---- Drawing ----


def draw_case(seed: int, device: str) -> Case:
    rng = np.random.default_rng(seed)
    flip = lambda chance: bool(rng.random() < chance)  # noqa: E731
    page_size = int(rng.choice(PAGE_SIZES))
    tokens = int(10 ** rng.uniform(1, math.log10(MOST_TOKENS[device])))
    batch = int(rng.integers(1, 1 + min(MOST_BATCH[device], max(1, int(10 ** rng.uniform(0, 2.7))))))
    if flip(0.02):
        batch = 0
    heads = int(rng.choice([1, 2, 3, 7, 8, 9, 12, 16, 17, 24, 31, 32, 33, 40, 64, 100, 127, 128]))
    ragged = flip(0.3)
    most_queries = int(rng.choice([1, 1, 1, 2, 3, 5, 9]))
    queries = [int(rng.integers(0, most_queries + 1)) if ragged else most_queries for _ in range(batch)]
    lengths = _draw_lengths(rng, batch, tokens, page_size)
    while sum(n * q for n, q in zip(lengths, queries)) * heads * 1100 > MOST_WORK[device]:
        lengths = [n // 2 for n in lengths]
    return Case(
        seed=seed,
        dtype=str(rng.choice(["bfloat16", "float16"])),
        latent_dim=int(rng.choice([512, 512, 256])),
        heads=heads,
        page_size=page_size,
        lengths=lengths,
        queries=queries,
        ragged=ragged,
        csr=flip(0.3),
        causal=flip(0.7),
        scale=float(rng.choice([DEEPSEEK_SCALE, 576**-0.5, 1e-3, 0.2])),
        uneven=flip(0.3),
        magnitude=float(rng.choice([1.0, 0.25])),
        split_q=flip(0.3),
        split_cache=str(rng.choice(["no", "no", "views", "apart"])),
        cache_heads_dim=flip(0.2),
        shared_prefix=flip(0.2),
        spare_pages=int(rng.choice([1, 3, 50])),
        spare_columns=int(rng.choice([0, 1, 7, 300])),
        outputs=str(rng.choice(["made", "out", "lse", "both", "both"])),
        planned=flip(0.2),
        few_sms=flip(0.4),
    )


def _draw_lengths(rng: np.random.Generator, batch: int, tokens: int, page_size: int) -> list[int]:
    """Lengths that add up to some `tokens`: alike, spread over orders of magnitude, at edges, or one giant."""
    if batch == 0:
        return []
    mean = max(1, tokens // batch)
    kind = rng.choice(["alike", "spread", "edges", "giant", "tiny"])
    if kind == "alike":
        lengths = np.full(batch, mean)
    elif kind == "spread":
        lengths = (mean * 10 ** rng.uniform(-2, 0.3, batch)).astype(int)
    elif kind == "edges":
        step = int(rng.choice([64, page_size]))
        lengths = rng.integers(0, max(1, mean // step) + 1, batch) * step + rng.integers(-1, 2, batch)
    elif kind == "giant":
        lengths = rng.integers(0, 100, batch)
        lengths[rng.integers(batch)] = tokens
    else:
        lengths = rng.integers(0, 12, batch)
    lengths[rng.random(batch) < rng.choice([0, 0.1])] = 0
    return [int(n) for n in np.clip(lengths, 0, None)]


# ---- Placing ----


class Maker:
    """Places arrays in buffers of poison, with strides drawn at random."""

    def __init__(self, case: Case, device: str) -> None:
        self.rng = np.random.default_rng([case.seed, 1])
        self.device = device
        self.dtype = getattr(torch, case.dtype)
        self.generator = torch.Generator(device).manual_seed(case.seed)
        self.buffers: list[Buffer] = []

    def flip(self, chance: float) -> bool:
        return bool(self.rng.random() < chance)

    def place(
        self, name: str, shape: tuple[int, ...], dtype: Any, multiple: int = 1, contiguous_last: bool = True
    ) -> Any:
        """An array of poison. Strides and offset are multiples of `multiple` elements."""
        shape_left = list(enumerate(shape))
        order = [shape_left.pop()] if contiguous_last else []
        if self.flip(0.5):
            order += shape_left[::-1]
        else:
            order += [shape_left[i] for i in self.rng.permutation(len(shape_left))]
        strides, extent = [0] * len(shape), 1
        for axis, size in order:
            strides[axis] = extent
            gap = int(self.rng.choice([0, 0, 1, 2, 5]))
            extent = -(-extent * max(1, size) // multiple) * multiple + gap * multiple
            if contiguous_last and axis == len(shape) - 1 and not self.flip(0.5):
                extent = -(-max(1, size) // multiple) * multiple
        return self.embed(name, shape, tuple(strides), dtype, multiple)

    def embed(self, name: str, shape: tuple[int, ...], strides: tuple[int, ...], dtype: Any, multiple: int) -> Any:
        item = torch.empty((), dtype=dtype).element_size()
        guard = GUARD_BYTES // item
        offset = guard + multiple * int(self.rng.integers(0, 4))
        extent = 1 + sum(max(0, size - 1) * stride for size, stride in zip(shape, strides))
        base = torch.empty(offset + extent + guard, dtype=dtype, device=self.device)
        if dtype == torch.int32:
            base.fill_(int(self.rng.choice(POISON_INTS)))
        elif dtype == torch.float32:
            base.view(torch.int32).fill_(-1)
        else:
            base.view(torch.int16).fill_(NAN_BITS)
        view = base.as_strided(shape, strides, offset)
        self.buffers.append(Buffer(name, base, view, (shape, strides, offset)))
        return view

    def ints(self, name: str, values: np.ndarray[Any, Any], contiguous_last: bool = True) -> Any:
        view = self.place(name, values.shape, torch.int32, contiguous_last=contiguous_last)
        view.copy_(torch.from_numpy(values.astype(np.int32)))
        return view

    def normal(self, shape: tuple[int, ...], magnitude: float) -> Any:
        values = torch.randn(shape, generator=self.generator, device=self.device, dtype=torch.float32)
        return (values * magnitude).to(self.dtype)


def make_queries(case: Case, maker: Maker) -> Any:
    leading = (sum(case.queries),) if case.ragged else (case.batch, case.queries[0] if case.queries else 1)
    leading += (case.heads,)
    values = maker.normal((*leading, case.latent_dim + ROPE_DIM), 1.0)
    if case.uneven:
        values[..., -1] = 1
        values[..., 1::2, -1] = -1
    if not case.split_q:
        q = maker.place("q", tuple(values.shape), maker.dtype)
        return q.copy_(values)
    parts = values.split([case.latent_dim, ROPE_DIM], dim=-1)
    return tuple(maker.place(f"q[{i}]", tuple(p.shape), maker.dtype).copy_(p) for i, p in enumerate(parts))


def make_pages(case: Case, maker: Maker) -> tuple[list[np.ndarray[Any, Any]], Any, list[Any]]:
    """The page numbers of each request; the cache as mla_decode takes it; its parts, (pages, page_size, dim)."""
    counts = [-(-n // case.page_size) for n in case.lengths]
    num_pages = sum(counts) + case.spare_pages
    numbers = maker.rng.permutation(num_pages)
    pages = np.split(numbers[: sum(counts)], np.cumsum(counts)[:-1]) if counts else []
    if case.shared_prefix:
        for request in range(1, case.batch):
            common = min(case.lengths[0], case.lengths[request]) // case.page_size
            pages[request][:common] = pages[0][:common]

    dims = (case.latent_dim, ROPE_DIM)
    shape = (num_pages, case.page_size)
    heads_dim = (1,) if case.cache_heads_dim else ()
    if case.split_cache == "apart":
        parts = [maker.place(f"kv_cache[{i}]", (*shape, *heads_dim, d), maker.dtype, 8) for i, d in enumerate(dims)]
        cache: Any = tuple(parts)
    else:
        packed = maker.place("kv_cache", (*shape, *heads_dim, sum(dims)), maker.dtype, 8)
        parts = list(packed.split(dims, dim=-1))
        cache = packed if case.split_cache == "no" else tuple(parts)
    parts = [part.squeeze(2) if case.cache_heads_dim else part for part in parts]

    where: list[Any] = [np.zeros(0, np.int64)]
    for own, length in zip(pages, case.lengths):
        token = np.arange(length)
        where.append(own[token // case.page_size] * case.page_size + token % case.page_size)
    filled = np.unique(np.concatenate(where))
    page, slot = (torch.from_numpy(x).to(maker.device) for x in np.divmod(filled, case.page_size))
    values = maker.normal((len(filled), sum(dims)), case.magnitude)
    if case.uneven:
        levels = torch.from_numpy(maker.rng.choice(LEVELS, num_pages)).to(maker.device)
        values[:, -1] = (levels[page] * math.log(2) / case.scale).to(maker.dtype)
    for part, new in zip(parts, values.split(dims, dim=-1)):
        part[page, slot] = new
    return pages, cache, parts


def make_tables(case: Case, maker: Maker, pages: list[np.ndarray[Any, Any]]) -> Any:
    if case.csr:
        spare = maker.rng.integers(0, 1 + case.spare_columns, case.batch + 1)
        rows = [maker.rng.choice(POISON_INTS, spare[0])]
        rows += [np.concatenate([p, maker.rng.choice(POISON_INTS, n)]) for p, n in zip(pages, spare[1:])]
        indptr = np.cumsum([len(row) for row in rows])
        return maker.ints("block_table[0]", np.concatenate(rows)), maker.ints("block_table[1]", indptr)
    columns = max(map(len, pages), default=0) + case.spare_columns
    table = maker.rng.choice(POISON_INTS, (case.batch, columns))
    for row, own in zip(table, pages):
        row[: len(own)] = own
    return maker.ints("block_table", table)


# ---- Running ----


def run_case(case: Case, device: str, memory: GuardedMemory | None) -> tuple[int, float]:
    """Decode, compare, look for damage. Returns how often it was decoded, and the worst error over the accepted one."""
    maker = Maker(case, device)
    q = make_queries(case, maker)
    pages, cache, parts = make_pages(case, maker)
    arguments: dict[str, Any] = {
        "q": q,
        "kv_cache": cache,
        "block_table": make_tables(case, maker, pages),
        "cache_seqlens": maker.ints("cache_seqlens", np.array(case.lengths), contiguous_last=False),
        "softmax_scale": case.scale,
        "causal": case.causal,
    }
    starts = np.cumsum([0, *case.queries])
    if case.ragged:
        arguments["cu_seqlens_q"] = maker.ints("cu_seqlens_q", starts)
    first_q = q[0] if case.split_q else q
    out_shape = (*first_q.shape[:-1], case.latent_dim)
    lse_shape = (case.heads, first_q.shape[0]) if case.ragged else (case.batch, case.heads, first_q.shape[1])

    results = []
    for again in (False, True):
        given: dict[str, Any] = {}
        inputs = len(maker.buffers)
        if case.outputs in ("out", "both"):
            given["out"] = maker.place("out", out_shape, maker.dtype, 8)
        if case.outputs in ("lse", "both"):
            given["lse"] = maker.place("lse", lse_shape, torch.float32, contiguous_last=False)
        for buffer in maker.buffers:
            buffer.before = buffer.base.clone()
        if memory is not None:
            memory.poison()
        with _few_sms() if case.few_sms and device == "cuda" else nullcontext():
            if case.planned and again:
                plan = plan_decode(**arguments, **given, return_lse=True)
                out, lse = plan.run(q), plan.lse
            else:
                out, lse = mla_decode(**arguments, **given, return_lse=True)
        _expect(tuple(out.shape) == out_shape and tuple(lse.shape) == lse_shape, f"shapes {out.shape}, {lse.shape}")
        _expect(given.get("out", out) is out and given.get("lse", lse) is lse, "given outputs are not those returned")
        _check_buffers(maker.buffers[:inputs], maker.buffers[inputs:])
        if memory is not None:
            memory.check()
        results.append((out.clone(), lse.clone()))
        del maker.buffers[inputs:]
    for first, second, bits in zip(*results, (torch.int16, torch.int32)):
        _expect(bool((first.view(bits) == second.view(bits)).all()), "the second run gave other bits")
    return len(results), _compare(case, maker, parts, pages, starts, first_q if not case.split_q else q, *results[0])


@cache
def _part_stream() -> Any:
    return torch.cuda.ExternalStream(green_context.stream_on(FEW_SMS, torch.cuda.current_device()))


@contextmanager
def _few_sms() -> Iterator[None]:
    """Within, torch's current stream runs on FEW_SMS SMs, after what was launched before and before what comes next."""
    everything, part = torch.cuda.current_stream(), _part_stream()
    part.wait_stream(everything)
    with torch.cuda.stream(part):
        yield
    everything.wait_stream(part)


def _check_buffers(inputs: list[Buffer], outputs: list[Buffer]) -> None:
    for buffer in inputs:
        _expect(_same_bits(buffer.base, buffer.before), f"{buffer.name} or what lies around it was written")
    for buffer in outputs:
        buffer.before.as_strided(*buffer.index).copy_(buffer.view)
        _expect(_same_bits(buffer.base, buffer.before), f"something outside of {buffer.name} was written")


def _same_bits(a: Any, b: Any) -> bool:
    bits = torch.int16 if a.element_size() == 2 else torch.int32
    return torch.equal(a.view(bits), b.view(bits))


def _compare(
    case: Case,
    maker: Maker,
    parts: list[Any],
    pages: list[np.ndarray[Any, Any]],
    starts: np.ndarray[Any, Any],
    q: Any,
    out: Any,
    lse: Any,
) -> float:
    """Hold a result against float64, computed on the same device; returns the worst error over the accepted one."""
    packed = torch.cat(list(q), dim=-1) if case.split_q else q
    if not case.ragged:  # (b, s_q, ...) and (b, h, s_q) become (tokens, ...) and (h, tokens)
        packed, out = packed.flatten(0, 1), out.flatten(0, 1)
        lse = lse.transpose(0, 1).flatten(1)
    errors = []
    for request, (length, own) in enumerate(zip(case.lengths, pages)):
        tokens = slice(int(starts[request]), int(starts[request + 1]))
        count = tokens.stop - tokens.start
        if count == 0:
            continue
        index = torch.from_numpy(own.astype(np.int64)).to(maker.device)
        keys = torch.cat([part[index].flatten(0, 1)[:length] for part in parts], dim=-1).double()
        exact, exact_lse = _attend(packed[tokens].double(), keys, case)
        errors.append(_error(case, out[tokens].double(), lse[:, tokens].double(), exact, exact_lse))
    if not errors:
        return 0.0
    table = torch.stack(errors).cpu().numpy()  # the only time that the host waits for the comparison
    for request_errors, message in ((table[:, 0], "out"), (table[:, 1], "lse"), (table[:, 2], "queries without keys")):
        worst = float(np.nan_to_num(request_errors, nan=np.inf).max())
        if worst > 1:
            at = [r for r, n in enumerate(case.queries) if n][int(np.nan_to_num(request_errors, nan=np.inf).argmax())]
            raise Failure(
                f"request {at} of {case.lengths[at]} tokens: {message} is {worst:.3g} times the accepted error"
            )
    return float(table.max())


def _attend(q: Any, keys: Any, case: Case) -> tuple[Any, Any]:
    """(count, heads, latent_dim) and (heads, count) of one request, in float64; zeros and -inf without keys."""
    count, length = q.shape[0], keys.shape[0]
    scores = torch.einsum("qhd,kd->hqk", q, keys) * case.scale
    if case.causal:
        last = length - count + torch.arange(count, device=q.device)
        scores.masked_fill_(torch.arange(length, device=q.device) > last[:, None], -math.inf)
    lse = torch.logsumexp(scores, dim=-1) if length else torch.full(scores.shape[:2], -math.inf, device=q.device)
    weights = torch.exp(scores - lse.masked_fill(torch.isneginf(lse), 0)[..., None])
    return torch.einsum("hqk,kd->qhd", weights, keys[:, : case.latent_dim]), lse.double()


def _error(case: Case, out: Any, lse: Any, exact: Any, exact_lse: Any) -> Any:
    """Errors of one request over the accepted ones: of out, of lse, and 0 or infinity for queries without keys."""
    no_key = torch.isneginf(exact_lse)
    size = torch.linalg.vector_norm(exact)
    error = torch.linalg.vector_norm(out - exact) / (REQUEST_ERROR[case.dtype] * size).clamp_min(1e-300)
    # LSE_ERROR is for DeepSeek's scale; the rounding of a score is scaled as the score is.
    accepted = LSE_ERROR * max(1.0, case.scale / DEEPSEEK_SCALE) + LSE_RELATIVE_ERROR * exact_lse.abs()
    lse_error = ((lse - exact_lse).abs() / accepted).masked_fill(no_key, 0).max()
    wrong = (torch.isneginf(lse) != no_key).any() | out[no_key.T].any()
    return torch.stack([error, lse_error, torch.where(wrong, math.inf, 0.0)])


def _expect(truth: bool, message: str) -> None:
    if not truth:
        raise Failure(message)


# ---- The loop ----


def fuzz(device: str, seed: int = 0, cases: int | None = None, seconds: float | None = None) -> Summary:
    """Run cases seed, seed + 1, ... until there were so many, or so much time has passed. Raises Failure."""
    summary = Summary()
    memory = GuardedMemory(device) if device == "cuda" else None
    start = time.monotonic()
    original = driver.allocate_zeroed
    if memory is not None:
        workspace._workspaces.clear()
        workspace._counters.clear()
        driver.allocate_zeroed = memory.allocate_zeroed  # type: ignore[assignment]
    try:
        while (cases is None or summary.cases < cases) and (seconds is None or summary.seconds < seconds):
            case = draw_case(seed + summary.cases, device)
            try:
                runs, worst = run_case(case, device, memory)
            except Exception as error:
                command = f"python tools/fuzz.py --device {device} --seed {case.seed} --cases 1"
                raise Failure(f"{error}\nrepeat: {command}\n{dataclasses.asdict(case)}") from error
            summary.cases += 1
            summary.runs += runs
            summary.tokens += sum(case.lengths)
            summary.worst = max(summary.worst, worst)
            summary.seen.update(_features(case))
            summary.seconds = time.monotonic() - start
    finally:
        if memory is not None:
            torch.cuda.synchronize()
            driver.allocate_zeroed = original
            workspace._workspaces.clear()  # they lie in torch's memory, which goes with `memory`
            workspace._counters.clear()
    return summary


def _features(case: Case) -> list[str]:
    rows = max(case.queries, default=1) * case.heads
    tile = next((t for t in ROW_TILES if t >= rows), ROW_TILES[-1])
    names = [case.dtype, f"{case.latent_dim} dims", f"page {case.page_size}", f"{tile} rows"]
    flags = ("ragged", "csr", "causal", "uneven", "split_q", "shared_prefix", "planned", "few_sms")
    names += [flag for flag in flags if getattr(case, flag)]
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, help="of the first case; by default the time")
    parser.add_argument("--cases", type=int, help="how many")
    parser.add_argument("--seconds", type=float, help="how long, 60 if nothing is said")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    seed = int(time.time()) * 1_000_000 if options.seed is None else options.seed
    seconds = 60.0 if options.seconds is None and options.cases is None else options.seconds
    if not options.json:
        print(f"seed {seed} on {options.device}", flush=True)
    try:
        summary = fuzz(options.device, seed, options.cases, seconds)
    except Failure as failure:
        print(failure, file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps({"seed": seed, **vars(summary)}, indent=2))
    else:
        print(
            f"{summary.cases} cases, {summary.runs} runs, {summary.tokens:,} tokens in {summary.seconds:.1f} s, "
            f"no failure; the worst error was {summary.worst:.2f} of the accepted one"
        )
        print(", ".join(f"{name} {count}" for name, count in sorted(summary.seen.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
