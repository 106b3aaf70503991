"""What all benchmarks share: on what machine they ran, and how their figures are kept."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from napari_mrcnn3d._files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
SHARED_DATA = ROOT.parent / "shared" / "data"
_PACKAGES = ("napari-mrcnn3d", "torch", "numpy", "scipy", "scikit-image")


def describe_machine() -> dict[str, Any]:
    """Processor, memory, accelerator, versions, date and how busy the machine was; no host or user name."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": psutil.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "not limited"),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "accelerator": _accelerator(),
        "load_average": round(psutil.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
        "commit": _commit(),
    }


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Rows as a markdown table; numbers below get three digits, None a dash."""
    lines = [list(header), ["---"] * len(header), *([_cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write_results(name: str, content: Mapping[str, Any], text: str) -> None:
    """Print the text, and keep it and the figures as ``bench/results/<name>.md`` and ``.json``."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    machine = describe_machine()
    where = f"{machine['date']}, {machine['processor']}, {machine['cores']} cores"
    where += f", {machine['accelerator']}" if machine["accelerator"] else ""
    text = f"{text}\nMeasured {where}; load average {machine['load_average']}.\n"
    document = json.dumps({"machine": machine, **content}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    for suffix, body in ((".json", document), (".md", text)):
        with atomic_write(RESULTS / f"{name}{suffix}") as path:
            path.write_text(body, encoding="utf-8")
    print(text)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _processor() -> str:
    """Name of the processor; Linux alone tells it in a file."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _accelerator() -> str | None:
    """Name of the CUDA device, asked only where the benchmark itself has used torch."""
    torch = sys.modules.get("torch")
    return torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
