"""The tables of ``dibit bench`` in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import itemgetter
from typing import Any

from dibit.tools import markdown
from dibit.tools.errors import printable
from dibit.tools.markdown import plain, table


def show(content: Mapping[str, Any]) -> None:
    """Print what was measured, and on what machine."""
    results, machine, versions = content["results"], content["machine"], content["versions"]
    blocks: list[str] = []
    for title, headings, rows in _KINDS[content["bench"]](results):
        columns = [(heading, itemgetter(i)) for i, heading in enumerate(headings)]
        blocks.append(table(printable(title), columns, [("", rows)]))
    used = ", ".join(f"{name} {versions[name]}" for name in ("torch", "torch_geometric", "numba"))
    blocks.append(plain(f"{machine['processor']}, {machine['threads']} threads; {used}"))
    failed = [row for row in results.get("rows", ()) if "failed" in row]
    blocks += [plain(f"{row['setting']} failed: {row['failed']}") for row in failed]
    markdown.show(blocks, 120)


Table = tuple[str, list[str], list[list[str]]]


def _speed(results: Mapping[str, Any]) -> Iterator[Table]:
    rows = []
    for row in results["rows"]:
        if "failed" in row:
            rows.append([row["setting"], *["-"] * 5])
            continue
        times = [f"{row[name]:.4g}" for name in ("seconds", "forward", "backward")]
        rows.append([row["setting"], *times, f"{row['ratio']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}"])
    headings = ["setting", "s a step", "forward", "backward", f"to {results['base']}", "quartiles"]
    yield f"{results['workload']}; {results['rounds']} rounds", headings, rows


def _memory(results: Mapping[str, Any]) -> Iterator[Table]:
    plain = {row["layers"]: row.get("peak") for row in results["rows"] if row["setting"] == "plain"}
    rows = []
    for row in results["rows"]:
        base = plain.get(row["layers"])
        share = f"{row['peak'] / base:.3f}" if base and row.get("peak") else "-"
        cells = [_mb(row.get(name)) for name in ("saved", "ledger", "peak", "resident")]
        rows.append([row["setting"], str(row["layers"]), *cells, share])
    headings = ["setting", "layers", "saved MB", "by track", "peak MB", "resident MB", "peak to plain"]
    yield results["workloads"][0], headings, rows


def _mb(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _gradient(results: Mapping[str, Any]) -> Iterator[Table]:
    epochs = results["epochs"]
    for graph in results["graphs"]:
        rows = [
            [row["setting"], _range(row["bytes"].values()), *(f"{row['errors'][str(e)]:.3f}" for e in epochs)]
            for row in graph["rows"]
        ]
        title = f"{results['model']} on {graph['graph']} ({graph['nodes']:,} nodes): squared error of the gradient"
        yield title, ["setting", "B / node", *(f"epoch {e}" for e in epochs)], rows


def _range(values: Iterable[float]) -> str:
    low, high = f"{min(values := [*values]):.1f}", f"{max(values):.1f}"
    return low if low == high else f"{low} to {high}"


def _noise(results: Mapping[str, Any]) -> Iterator[Table]:
    tables: dict[tuple[Any, ...], dict[tuple[Any, ...], dict[int, float]]] = {}
    for row in results["rows"]:
        name = row["norm"] + (", residual" if row["residual"] else "")
        rows = tables.setdefault((row["graph"], row["model"], row["epoch"]), {})
        rows.setdefault((name, row["setting"]), {})[row["layers"]] = row["error"]
    for (graph, model, epoch), rows in tables.items():
        layers = sorted({count for found in rows.values() for count in found})
        cells = [
            [*key, *(f"{found[count]:.3g}" if count in found else "-" for count in layers)]
            for key, found in rows.items()
        ]
        title = f"{model} on {graph}, epoch {epoch}: squared error of the gradient over its square, by layers"
        yield title, ["norm", "setting", *map(str, layers)], cells


def _codec(results: Mapping[str, Any]) -> Iterator[Table]:
    rows = [
        [row["kernel"], f"{1000 * row['seconds']:.2f}", f"{row['gb_s']:.2f}", f"{100 * row['share']:.0f} %"]
        for row in results["rows"]
    ]
    title = f"{results['elements']:,} float32, blocks of {results['block']:,}; {results['rounds']} rounds"
    yield title, ["kernel", "ms", "GB/s", "of a copy"], rows


_KINDS: dict[str, Callable[[Mapping[str, Any]], Iterator[Table]]] = {
    "speed": _speed,
    "memory": _memory,
    "gradient": _gradient,
    "noise": _noise,
    "codec": _codec,
}
