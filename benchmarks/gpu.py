"""What a GPU can tell: whether its kernels give the definition's numbers, how fast they are, how a step runs.

    python benchmarks/gpu.py --out gpu.json

Needs this repository, torch, Triton and PyTorch Geometric; nothing has to be installed of Dibit itself. `--device cpu`
with `TRITON_INTERPRET=1` runs the same in Triton's interpreter, at a small `--scale`.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(_ROOT / "src"), str(_ROOT)]
warnings.filterwarnings("ignore")

if importlib.util.find_spec("triton") is None:
    sys.exit("gpu.py: Triton is not installed here; builds of torch with CUDA bring it along: 'pip install triton'.")

import torch  # noqa: E402
from tests.gpu import cases  # noqa: E402
from torch import nn  # noqa: E402

import dibit  # noqa: E402
from dibit.bench.speed import reason  # noqa: E402
from dibit.bench.workload import BenchmarkBatch, TrainingStep, Workload  # noqa: E402
from dibit.codec import ops, seed_tensor  # noqa: E402
from dibit.codec.backends import triton as cuda  # noqa: E402

SETTINGS = ("plain", "compile", "checkpoint", "bf16", "exact", "iexact", "small", "default")
PARTS = ("check", "graph", "programs", "kernels", "train", "profile")
MB = 2.0**20
_SHARED = ("shape", "model", "form", "scale", "rounds", "steps", "device")  # options that every part takes
_CALLS = 10  # in a row, where one is timed


def main() -> int:
    args = _arguments()
    device = torch.device(args.device)
    if (wrong := _unfit(device)) is not None:
        print(f"gpu.py: {wrong}")
        return 2
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if device.type == "cpu":
        import tests.gpu.interpreter  # noqa: F401
    if len(args.only) > 1:
        return _each_part(device, args)
    (part,) = args.only
    results = {"machine": machine(device), part: globals()[part](device, args)}
    _write(args.out, results)
    return 1 if _wrong(results) else 0


def _each_part(device: torch.device, args: argparse.Namespace) -> int:
    """Each part in a process of its own: an error on the device ends that part, not the others."""
    results: dict[str, Any] = {"machine": machine(device)}
    print("  ".join(f"{key}: {value}" for key, value in results["machine"].items()), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for part in args.only:
            own = Path(folder) / f"{part}.json"
            given = [f"--{name}={getattr(args, name)}" for name in _SHARED]
            done = subprocess.run(
                [sys.executable, __file__, *given, "--settings", *args.settings, "--only", part, f"--out={own}"],
                check=False,
            )
            results[part] = json.loads(own.read_text())[part] if own.exists() else {"failed": done.returncode}
            _write(args.out, results)
    return 1 if _wrong(results) else 0


def _wrong(results: dict[str, Any]) -> list[str]:
    """What is not as it should be."""
    found = [row["case"] for row in results.get("check", ()) if isinstance(row, dict) and not row["agrees"]]
    if results.get("graph", {}).get("fresh") is False:
        found.append("seeds in a CUDA graph")
    layers = (row for row in results.get("programs", ()) if isinstance(row, dict))
    found += [f"bits of {row['layer']}" for row in layers if not row["plain_bits"]]
    found += [part for part, result in results.items() if isinstance(result, dict) and "failed" in result]
    if found:
        print(f"gpu.py: not as it should be: {', '.join(found[:9])}{' ...' if len(found) > 9 else ''}")
    return found


def _unfit(device: torch.device) -> str | None:
    """Why nothing can be run here, in a sentence."""
    if device.type != "cuda":
        return None
    if not torch.cuda.is_available():
        return "torch sees no GPU here; run it on a machine with one, or in the interpreter (see --help)."
    if shutil.which(os.environ.get("CC", "")) is None and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        return "there is no C compiler here, which Triton needs to launch kernels; install gcc, or set CC."
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Python's headers are not here, which Triton needs to launch kernels; install python3-dev."
    return None


def _write(out: str | None, results: dict[str, Any]) -> None:
    if out:
        Path(out).write_text(json.dumps(results, indent=2) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run (default: all)")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS, help="how to train")
    parser.add_argument("--shape", default="arxiv", help="sizes of the graph (default: arxiv)")
    parser.add_argument("--model", default="sage", help="as in dibit bench speed (default: sage)")
    parser.add_argument("--form", default="csr", choices=("csr", "edge_index"), help="how the model gets its graph")
    parser.add_argument("--scale", type=float, default=1.0, help="of nodes, edges and tensors (default: 1)")
    parser.add_argument("--rounds", type=int, default=11, help="counted rounds (default: 11)")
    parser.add_argument("--steps", type=int, default=5, help="training steps in a round (default: 5)")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu in the interpreter")
    parser.add_argument("--out", help="JSON file with all figures")
    return parser.parse_args()


def machine(device: torch.device) -> dict[str, str]:
    import torch_geometric
    import triton

    found = {"torch": torch.__version__, "triton": triton.__version__, "pyg": torch_geometric.__version__}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["runtime"] = torch.version.cuda or f"HIP {torch.version.hip}"
    else:
        found["device"] = "interpreter"
    return found


def say(text: str) -> None:
    """Progress, on one line of a terminal."""
    end = "\r" if sys.stderr.isatty() else "\n"
    print(f"{text:<100}", end=end, file=sys.stderr, flush=True)


# -- the kernels against the definition ---------------------------------------------------------------------------


def check(device: torch.device, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Each kernel on the device, and the definition on the CPU, on the same numbers; a process a family compiles."""
    scale = max(1, min(20, round(20 * args.scale)))
    workers = max(1, min(len(cases.FAMILIES), (os.cpu_count() or 2) // 2))
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = {pool.submit(_family, name, scale, args.device): name for name in cases.FAMILIES}
        for done, job in enumerate(as_completed(jobs), 1):
            say(f"checked {jobs[job]}, {done} of {len(jobs)}")
            try:
                rows += job.result()
            except Exception as error:
                rows.append({"case": jobs[job], "agrees": False, "failed": reason(error)})
    for row in rows:
        if not row["agrees"]:
            print(f"NOT AS DEFINED  {row['case']}: {row.get('failed', row.get('apart'))}")
    print(f"{sum(row['agrees'] for row in rows)} of {len(rows)} cases as the definition has them\n")
    return rows


def _family(name: str, scale: int, device: str) -> list[dict[str, Any]]:
    torch.set_num_threads(2)
    if device == "cpu":
        import tests.gpu.interpreter  # noqa: F401
    else:
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    rows = []
    for case in cases.FAMILIES[name](scale):
        row: dict[str, Any] = {"case": case.title}
        try:
            found = cases.computed(cuda, case, device)
            row["apart"] = cases.apart(found, cases.expected(case), case.tolerance)
            row["agrees"] = row["apart"] <= case.tolerance
        except Exception as error:
            row |= {"agrees": False, "failed": reason(error)}
        rows.append(row)
    return rows


# -- seeds in a CUDA graph ----------------------------------------------------------------------------------------


def graph(device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """A step, captured once and replayed: other numbers each time, and unbiased."""
    if device.type != "cuda":
        return {"skipped": "the interpreter captures nothing"}
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 8)).to(device)
    x, y = torch.randn(512, 64, device=device), torch.randint(8, (512,), device=device)
    loss = nn.functional.cross_entropy(model(x.clone().requires_grad_()), y)
    exact = torch.autograd.grad(loss, model[3].weight)[0].double()
    dibit.compress(model, dibit.Config(block=64))

    def step() -> None:
        nn.functional.cross_entropy(model(x), y).backward()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            step()
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad(set_to_none=True)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        step()
    draws = []
    for _ in range(400):
        model.zero_grad(set_to_none=False)
        captured.replay()
        draws.append(model[3].weight.grad.double().clone())
    found = torch.stack(draws)
    error = found.std(0) / len(found) ** 0.5
    z = float(((found.mean(0) - exact) / error.clamp(min=1e-12)).square().mean().sqrt())
    fresh = not torch.equal(found[0], found[1]) and 0.7 < z < 1.4
    print(f"a captured step: {'other' if fresh else 'THE SAME'} numbers at each replay, deviation {z:.2f} (1 expected)")
    return {"fresh": fresh, "z": z}


# -- networks on each edge ----------------------------------------------------------------------------------------


def programs(device: torch.device, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Whether layers with a network on each edge have plain torch's bits, and what a step takes beside a plain one."""
    from torch_geometric.nn import EdgeConv

    nodes, rows = max(1200, round(169_343 * args.scale)), []
    x, edge_index = torch.randn(nodes, 64, device=device), torch.randint(nodes, (2, 14 * nodes), device=device)
    for aggr in ("max", "sum"):
        network = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 64))
        layers = [EdgeConv(network, aggr=aggr).to(device).train()]
        layers.append(dibit.compress(copy.deepcopy(layers[0])))
        say(f"programs, {aggr}")
        plain, own = (layer(x, edge_index).detach() for layer in layers)
        exact = aggr == "max" or device.type == "cpu"  # torch's own sums have no fixed order on a GPU
        same = torch.equal(own, plain) if exact else torch.allclose(own, plain, rtol=1e-4, atol=1e-4)
        steps = [partial(_layer_step, layer, x, edge_index) for layer in layers]
        times = [[_seconds(step, device) for step in steps] for _ in range(args.rounds + 1)][1:]
        ratio = statistics.median(b / a for a, b in times)
        peaks = [_peak(step, device) for step in steps]
        rows.append(
            {"layer": f"EdgeConv, {aggr}", "plain_bits": same, "ratio": ratio, "plain": peaks[0], "peak": peaks[1]}
        )
    table(
        ("layer", "bits", "time to plain", "plain peak MB", "peak MB"),
        [
            (
                r["layer"],
                "plain" if r["plain_bits"] else "OTHER",
                f"{r['ratio']:.2f}",
                f"{r['plain']:.0f}",
                f"{r['peak']:.0f}",
            )
            for r in rows
        ],
    )
    return rows


def _layer_step(layer: nn.Module, x: torch.Tensor, edge_index: torch.Tensor) -> None:
    layer.zero_grad()
    layer(x, edge_index).square().mean().backward()


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    run()
    _synchronize(device)
    return time.perf_counter() - start


def _peak(run: Callable[[], Any], device: torch.device) -> float:
    """MB that a call allocates at most, beside what was there before."""
    if device.type != "cuda":
        return float("nan")
    _let_go(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    _synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / MB


# -- kernels against a copy ---------------------------------------------------------------------------------------


def kernels(device: torch.device, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Microseconds and GB/s of each kernel, all bytes read and written counted, beside a copy; interleaved medians.

    On a GPU ten calls are captured in a CUDA graph, so that Python is not timed, each after a write over its
    caches, whose own time is taken off. What a call costs the host is told beside.
    """
    found = _kernels(device, max(256, round(169_343 * args.scale)))
    clocks: dict[str, Callable[[], float]] = {}
    for name, (run, _) in found.items():
        say(f"kernels, {name}")
        clocks[name] = _clock(run, device)
    times: dict[str, list[float]] = {name: [] for name in found}
    for done in range(args.rounds + 1):
        say(f"kernels, round {done} of {args.rounds}")
        for name, clock in clocks.items():
            times[name].append(clock())
    rows = []
    for name, (run, size) in found.items():
        seconds = statistics.median(times[name][1:])
        host = _host_seconds(run, device)
        rows.append(
            {"kernel": name, "bytes": size, "us": seconds * 1e6, "host_us": host * 1e6, "gb_s": size / seconds / 1e9}
        )
    for row in rows:
        row["share"] = row["gb_s"] / rows[0]["gb_s"]
    table(
        ("kernel", "us", "host us", "GB/s", "of a copy"),
        [
            (r["kernel"], f"{r['us']:.1f}", f"{r['host_us']:.0f}", f"{r['gb_s']:.0f}", f"{100 * r['share']:.0f} %")
            for r in rows
        ],
    )
    return rows


def _clock(run: Callable[[], Any], device: torch.device) -> Callable[[], float]:
    """Seconds of one call, each time it is asked."""
    if device.type != "cuda":

        def once() -> float:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start

        return once
    flushed = torch.empty(1 << 28, dtype=torch.uint8, device=device)  # five times the caches of an H100
    both, alone = _captured(lambda: (flushed.zero_(), run())), _captured(flushed.zero_)
    return lambda: max(1e-9, (_replayed(both, device) - _replayed(alone, device)) / _CALLS)


def _captured(run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_CALLS):
            run()
    return graph


def _replayed(graph: torch.cuda.CUDAGraph, device: torch.device) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3


def _host_seconds(run: Callable[[], Any], device: torch.device) -> float:
    """What a call costs Python, the device's work not waited for."""
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(_CALLS if device.type == "cuda" else 1):
        run()
    seconds = time.perf_counter() - start
    _synchronize(device)
    return seconds / (_CALLS if device.type == "cuda" else 1)


def _kernels(device: torch.device, nodes: int) -> dict[str, tuple[Callable[[], Any], int]]:
    """By name: the call, and the bytes that it has to read and to write; tensors of nodes x 128."""
    width, seed = 128, seed_tensor(7, device)
    x, dy = torch.randn(nodes, width, device=device), torch.randn(nodes, width, device=device)
    out, flat, size = torch.empty_like(x), x.view(-1), x.nbytes
    own = cuda if device.type != "cuda" else ops
    found: dict[str, tuple[Callable[[], Any], int]] = {"copy": (lambda: out.copy_(x), 2 * size)}
    for bits, block in ((2, 1024), (2, 128), (1, 1024), (4, 1024), (8, 1024)):
        codes, ranges, _ = own.quantize(flat, seed, bits, block, [], torch.bfloat16, 0)
        moved, text = size + codes.nbytes + ranges.nbytes, f"{bits} bit, block {block}"
        found[f"quantise + pack, {text}"] = (
            partial(own.quantize, flat, seed, bits, block, [], torch.bfloat16, 0),
            moved,
        )
        found[f"unpack, {text}"] = (
            partial(own.dequantize, codes, ranges, seed, flat.numel(), bits, block, [], 0.0, torch.float32),
            moved,
        )
    m = nodes // 6
    index = torch.randperm(nodes, device=device)[:m].sort().values
    weight, vector = torch.full((m,), 6.0, device=device), torch.rand(width, device=device)
    rows = (x, index, None, None, seed, 2, 128, [], torch.bfloat16, 0)
    codes, ranges, _ = own.quantize_rows(*rows)
    found["gather a sixth + quantise"] = partial(own.quantize_rows, *rows), size // 6 + codes.nbytes
    sampled = (codes, ranges, seed, dy, index, weight, m, width, 2, 128, [], 0.0)
    found["weight gradient from a sixth"] = partial(own.weight_gradient, *sampled), size // 6 + codes.nbytes
    found["weight gradient, dense, torch"] = (lambda: dy.T @ x), 2 * size
    codes, ranges, _ = own.quantize(flat, seed, 2, 1024, [], torch.bfloat16, 0)
    kept = codes.nbytes + ranges.nbytes
    found["column sums"] = partial(own.column_sums, codes, ranges, seed, dy, 2, 1024, 1.0), size + kept
    found["norm gradient"] = (
        partial(own.norm_gradient, codes, ranges, seed, dy, vector, vector, vector, 2, 1024, 1.0),
        2 * size + kept,
    )
    mask = own.pack_mask(x)
    found["pack a mask"] = partial(own.pack_mask, x), size + mask.nbytes
    found["ReLU + mask"] = partial(own.relu, x), 2 * size + mask.nbytes
    found["scale by a mask"] = partial(own.scale_masked, dy, mask, 1.25), 2 * size + mask.nbytes
    found["apply a mask"] = partial(own.apply_mask, dy, mask, 0.0), 2 * size + mask.nbytes
    found["dropout from a seed"] = partial(own.dropout, x, seed, 0.5), 2 * size
    found["norm + ReLU + dropout + mask"] = (
        partial(own.norm_relu_dropout, x, vector, vector, vector, seed, 0.5),
        2 * size + mask.nbytes,
    )
    found["back through dropout and ReLU"] = (
        partial(own.relu_dropout_gradient, dy, mask, seed, 0.5),
        2 * size + mask.nbytes,
    )
    scores = own.row_scores(x)
    found["scores of rows"] = partial(own.row_scores, x), size + scores.nbytes
    found["pick a sixth of the rows"] = partial(own.pick_rows, scores, seed, m), 2 * scores.nbytes + 12 * m
    found["look for NaN and inf"] = partial(own.finite, x), size
    targets = nodes if device.type == "cuda" else 5  # the interpreter takes its time
    crow = torch.arange(0, 14 * targets + 1, 14, dtype=torch.int32, device=device)
    col, y, dx = (
        torch.randint(targets, (14 * targets,), dtype=torch.int32, device=device),
        *x.new_zeros(2, targets, width),
    )
    read = 14 * y.nbytes + col.nbytes
    found["maxima over 14 edges a node"] = partial(own.edge_extremes, y, crow, col, x, False), read + y.nbytes
    own.edge_extremes(y, crow, col, x, False)
    kept = own.edge_winners(crow, col, x, y)  # it waits for the device, so no CUDA graph can contain it
    gradient = partial(own.add_winners, dx, crow, col, *kept, dy[:targets], None)
    found["their gradient"] = gradient, read + 2 * y.nbytes + kept[0].nbytes
    return found


# -- training steps -----------------------------------------------------------------------------------------------


def train(device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds a step, MB saved by the forward pass, and the peak of a step, under each setting."""
    workload = Workload(args.shape, args.model, form=args.form, scale=args.scale)
    print(workload)
    rows: dict[str, dict[str, Any]] = {}
    steps: dict[str, TrainingStep] = {}
    batch = workload.build()[1].to(device)
    for setting in args.settings:
        say(f"memory of {setting}")
        try:
            step = _step(workload, batch, setting, device)
            rows[setting] = {"setting": setting, **_memory(step, device)}
            steps[setting] = step
        except Exception as error:
            rows[setting] = {"setting": setting, "failed": reason(error)}
        _let_go(device)
    times: dict[str, list[float]] = {setting: [] for setting in steps}
    for done in range(args.rounds + 1):
        say(f"steps, round {done} of {args.rounds}")
        for setting, step in list(steps.items()):
            try:
                _synchronize(device)
                start = time.perf_counter()
                for _ in range(args.steps):
                    step()
                _synchronize(device)
                times[setting].append((time.perf_counter() - start) / args.steps)
            except Exception as error:  # out of memory beside the others, say
                rows[setting]["failed"] = reason(error)
                del steps[setting], times[setting]
    del steps
    for setting, own in times.items():
        ratios = [a / b for a, b in zip(own[1:], times.get("plain", own)[1:], strict=True)]
        rows[setting] |= {"seconds": statistics.median(own[1:]), "ratio": statistics.median(ratios), "times": own[1:]}
    table(("setting", "ms a step", "to plain", "saved MB", "peak MB"), [_cells(row) for row in rows.values()])
    return {"workload": str(workload), "rows": list(rows.values())}


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    if "failed" in row:
        return f"{row['setting']}: {row['failed']}", "", "", "", ""
    return (
        row["setting"],
        f"{1e3 * row['seconds']:.2f}",
        f"{row['ratio']:.2f}",
        f"{row['saved']:.1f}",
        f"{row['peak']:.0f}",
    )


def _step(workload: Workload, batch: BenchmarkBatch, setting: str, device: torch.device) -> TrainingStep:
    step = TrainingStep(workload.build()[0].to(device), batch, setting)
    for _ in range(3):
        step()
    _synchronize(device)
    return step


def _memory(step: TrainingStep, device: torch.device) -> dict[str, float]:
    """MB that a warm forward pass keeps, and the most that is allocated during a step, data and weights included."""
    if device.type != "cuda":
        return {"saved": float("nan"), "peak": float("nan")}
    step.optimizer.zero_grad()
    before = torch.cuda.memory_allocated(device)
    logits = step.logits()
    saved = torch.cuda.memory_allocated(device) - before - logits.nbytes + step.batch.y.nbytes
    del logits
    _let_go(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    _synchronize(device)
    others = before - step.input_bytes()  # models and moments of other settings
    return {"saved": saved / MB, "peak": (torch.cuda.max_memory_allocated(device) - max(0, others)) / MB}


def profile(device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """The kernels that take most of a plain and of a default step."""
    if device.type != "cuda":
        return {"skipped": "the interpreter has no kernels to profile"}
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    workload, found = Workload(args.shape, args.model, form=args.form, scale=args.scale), {}
    batch = workload.build()[1].to(device)
    for setting in ("plain", "default"):
        step = _step(workload, batch, setting, device)
        with profiled(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as log:
            for _ in range(args.steps):
                step()
            _synchronize(device)
        events = [e for e in log.key_averages() if e.device_type == torch.profiler.DeviceType.CUDA]
        events.sort(key=lambda e: -e.self_device_time_total)
        found[setting] = [
            {"kernel": e.key[:90], "us": e.self_device_time_total / args.steps, "calls": e.count / args.steps}
            for e in events[:25]
        ]
        total = sum(e.self_device_time_total for e in events) / args.steps
        print(
            f"{setting}: {total / 1e3:.2f} ms of kernels a step, {sum(e.count for e in events) // args.steps} launches"
        )
        table(
            ("kernel", "us a step", "calls"),
            [(row["kernel"], f"{row['us']:.0f}", f"{row['calls']:.0f}") for row in found[setting]],
        )
    return found


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _let_go(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        cells = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join(cells).rstrip())
    print()


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
