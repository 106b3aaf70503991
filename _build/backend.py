"""Build backend: setuptools', which also asks for zig's compiler where the machine has none.

PyTorch is never a build requirement: the compiled library does not know it.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

from compile_library import find_compiler, is_unwanted

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    """What a wheel needs besides setuptools (PEP 517)."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *compiler_requirements()]


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    """What an editable installation needs besides setuptools (PEP 660)."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *compiler_requirements()]


def compiler_requirements() -> list[str]:
    """The package with zig's compiler if there is no other, it is wanted, and pip does not say that it has none."""
    if is_unwanted() or find_compiler() or not _zig_is_on_offer():
        return []
    return ["ziglang"]


def _zig_is_on_offer() -> bool:
    """False if pip finds no zig for this machine: a requirement that cannot be met would end the installation.

    Other installers than pip may be at work, in environments without it: they are trusted to find it.
    """
    # -I: pip hides itself from the environment that it makes for building
    pip = [sys.executable, "-I", "-m", "pip"]
    ask = [*pip, "--retries", "0", "--timeout", "15", "index", "versions", "ziglang"]
    if subprocess.run(ask, capture_output=True, check=False).returncode == 0:
        return True
    return subprocess.run([*pip, "--version"], capture_output=True, check=False).returncode != 0
