"""``dibit doctor``: what Dibit finds on this machine, and what is lost because something is missing."""

from __future__ import annotations

import json
import os
import platform
import textwrap
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Any

import torch
from torch import nn

import dibit
from dibit._torch.private import APIS, KNOWN, WITHOUT, missing
from dibit._torch.private.operations import kernel_cache
from dibit.codec import dispatch, ops
from dibit.codec.backends import reference
from dibit.tools.errors import UserError, nearest, printable, shown
from dibit.tools.files import json_path, write_atomically
from dibit.tools.parser import Parser

_DESCRIPTION = """\
Print what Dibit finds on this machine: versions, threads, which kernels run where, the folder of compiled kernels,
GPUs, and the private APIs of torch that Dibit uses. The exit status is 1 if something is lost because a part is
missing."""
_PACKAGES = ("dibit", "torch", "torch_geometric", "numpy", "scipy", "numba", "triton")
_PLAIN = "plain torch"


def doctor(argv: Sequence[str]) -> int:
    """Run ``dibit doctor``; returns the exit status: 0 where all is well, 1 where something is lost."""
    parser = Parser("dibit doctor", _DESCRIPTION)
    parser.flag("json", str, "Write what was found to this file, too.", "FILE")
    if parser.helps(argv):
        return 0
    path = json_path(parser.parse(argv).json)
    for name in os.environ.get(WITHOUT, "").replace(",", " ").split():
        if name not in APIS:
            raise UserError(f"{WITHOUT} has {shown(name)!r}, which Dibit does not use.{nearest(name, APIS)}")
    content = examine()
    print(printed(content))
    if path is not None:
        write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
    return 1 if content["lost"] else 0


def examine() -> dict[str, Any]:
    """Everything that is printed; "lost" has a sentence for each thing that is not as it should be."""
    lost: list[str] = []
    return {
        "versions": {
            **{name: _version(name) for name in _PACKAGES},
            "torch": str(torch.__version__),  # with the kind of its build
            "python": platform.python_version(),
        },
        "known": {"torch": KNOWN},
        "threads": _threads(lost),
        "kernels": _kernels(lost),
        "cache": _cache(lost),
        "gpus": _gpus(lost),
        "private": _private(lost),
        "lost": lost,
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _threads(lost: list[str]) -> dict[str, int]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    if threads > cores:
        lost.append(f"Time: torch has {threads} threads on {cores} cores; set OMP_NUM_THREADS={cores}.")
    return {"torch": threads, "cores": cores}


def _kernels(lost: list[str]) -> dict[str, dict[str, Any]]:
    """By type of device: what runs the codec's operators, and which of them run in plain torch."""
    names = [name for name in vars(ops) if name in reference.__all__]
    found: dict[str, dict[str, Any]] = {}
    for device in dict.fromkeys(("cpu", "cuda", *(point.name for point in entry_points(group=dispatch.GROUP)))):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what is missing is said below
                backend = dispatch.serving(device)
        except Exception as error:  # whatever a compiler, or somebody's package, may raise when it is loaded
            lost.append(f"The kernels for {device!r} tensors cannot be loaded: {_said(error)}")
            found[device] = {"by": None, "plain": names}
            continue
        plain = [name for name in names if not hasattr(backend, name)] if backend is not reference else names
        found[device] = {"by": _PLAIN if backend is reference else backend.__name__, "plain": plain}
        if backend is reference and (device != "cuda" or torch.cuda.is_available()):
            package = {"cpu": "numba", "cuda": "triton"}.get(device, device)
            lost.append(f"Time: plain torch runs the codec for {device!r} tensors; install {package}.")
    return found


def _cache(lost: list[str]) -> dict[str, Any] | None:
    """The folder of Numba's compiled kernels; `None` without Numba."""
    try:
        from dibit.codec.backends.cpu.jit import Kernel
        from dibit.codec.backends.cpu.kernels import elementwise
    except Exception:  # Numba is missing or broken: said among the kernels
        return None
    kernel = next(each for each in vars(elementwise).values() if isinstance(each, Kernel))
    folder = kernel_cache(kernel.serial)
    if folder is None:
        return None
    place = next(each for each in (folder, *folder.parents) if each.exists())
    writable = os.access(place, os.W_OK)
    if not writable:
        lost.append(f"Time: {folder} cannot be written, so every process compiles its kernels; set NUMBA_CACHE_DIR.")
    return {"folder": str(folder), "writable": writable, "kernels": len(list(folder.glob("*.nbi")))}


def _gpus(lost: list[str]) -> dict[str, str]:
    """By the name of each GPU: "works", or what went wrong when its kernels were compiled and run."""
    found = {}
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.device("cuda", number)
        name = f"{device}, {torch.cuda.get_device_name(device)}"
        problem = trial(device)
        found[name] = problem or "works"
        if problem:
            lost.append(f"Kernels fail on {name}: {problem}")
    return found


def trial(device: torch.device) -> str | None:
    """Compile and run kernels on a device: codes, which must be the CPU's, and two training steps.

    Returns:
        What went wrong, `None` where all is well.
    """
    try:
        x = torch.linspace(-1, 3, 1 << 14).view(256, 64)
        for bits in (1, 2, 4, 8):
            config = dibit.Config(bits=bits)
            if not torch.equal(dibit.encode(x.to(device), config, 0).codes.cpu(), dibit.encode(x, config, 0).codes):
                return f"the codes of {bits} bits are not those of the CPU"
        layers = nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 64), nn.GELU()
        model = dibit.compress(nn.Sequential(*layers, nn.LayerNorm(64), nn.Linear(64, 8)).to(device))
        for _ in range(2):
            model(x.to(device)).square().mean().backward()
        if not all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters()):
            return "gradients are missing or not finite"
    except Exception as error:  # of compilers and drivers
        return _said(error)
    return None


def _said(error: Exception) -> str:
    text = (str(error).strip() or "no message").splitlines()[0]
    return shown(f"{type(error).__name__}: {text}", 300)


def _private(lost: list[str]) -> list[dict[str, Any]]:
    lost += [f"{api.name} is missing. What is lost: {api.lost}." for api in missing()]
    return [
        {"name": api.name, "found": api.found, "purpose": api.purpose, "lost": api.lost, "needed": api.needed}
        for api in APIS.values()
    ]


def printed(content: dict[str, Any]) -> str:
    """What `examine` has found, as text."""
    versions, threads, cache = content["versions"], content["threads"], content["cache"]
    lines = ["Versions"]
    lines += [f"  {name:18}{number or 'not installed'}" for name, number in versions.items()]
    lines += [f"  Dibit knows torch {content['known']['torch']}.", "", "Threads"]
    lines += [f"  torch has {threads['torch']} on {threads['cores']} cores.", "", "Kernels"]
    for device, kernels in content["kernels"].items():
        lines.append(f"  {device:18}{_served(kernels)}")
    lines.append(f"  {'other devices':18}{_PLAIN}")
    lines += ["", "Compiled kernels"]
    if cache is None:
        lines.append("  Numba does not tell where they are.")
    else:
        can = "can" if cache["writable"] else "cannot"
        lines.append(f"  {printable(cache['folder'])} has {cache['kernels']}, and {can} be written.")
    lines += ["", "GPUs"]
    lines += [f"  {name}: {how}" for name, how in content["gpus"].items()] or [
        "  There is none, so whether kernels compile for one was not tried."
    ]
    lines += ["", "Private APIs: what Dibit uses of torch beyond its documentation"]
    width = max(len(api["name"]) for api in content["private"])
    for api in content["private"]:
        lines.append(f"  {'found  ' if api['found'] else 'MISSING'}  {api['name']:{width}}  to {api['purpose']}")
    lines += ["", "What is lost"]
    for sentence in content["lost"]:
        lines += textwrap.wrap(sentence, 116, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines if content["lost"] else [*lines, "  Nothing: all is well."])


def _served(kernels: dict[str, Any]) -> str:
    if kernels["by"] in (None, _PLAIN):
        return kernels["by"] or "cannot be loaded"
    rest = f", but {_PLAIN} for {', '.join(kernels['plain'])}" if kernels["plain"] else ""
    return f"{kernels['by']}{rest}"
