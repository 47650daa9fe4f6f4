"""Describe the machine and the software that the figures were measured with."""

import os
import platform
from pathlib import Path

import torch

from benchmarks.workload import Settings


def describe(settings: Settings) -> dict[str, str | int | bool]:
    """Return the machine and the software, for the header and the JSON."""
    device = settings.device
    return {
        "processor": _processor(),
        "cores": _cores(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mkl": bool(torch.backends.mkl.is_available()),  # type: ignore[no-untyped-call]
        "onednn": bool(torch.backends.mkldnn.is_available()),  # type: ignore[no-untyped-call]
        "threads": settings.threads,
        "dtype": str(settings.dtype).removeprefix("torch."),
    }


def header(settings: Settings, with_dtype: bool) -> str:
    """Return the same as two lines of text."""
    m = describe(settings)
    libraries = ", ".join(
        f"{'with' if m[key] else 'without'} {name}"
        for key, name in (("mkl", "MKL"), ("onednn", "oneDNN"))
    )
    on = "" if m["device"] == "cpu" else f" on {m['device']}"
    cores, threads = _count(m["cores"], "core"), _count(m["threads"], "thread")
    dtype = f", {m['dtype']}" if with_dtype else ""
    return (
        f"{m['processor']} ({m['vectors']}), {cores}, {m['system']}\n"
        f"torch {m['torch']} {libraries}; {threads}{dtype}{on}"
    )


def _count(number: object, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown processor"


def _cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
