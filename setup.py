"""The compiled part of the package; everything else is in pyproject.toml."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import FileError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "_build"))
import compile_library as library  # noqa: E402  (beside this file, wherever the build is started from)


class BuildLibrary(build_ext):
    """Compiles the library; without it the package still works, so no failure ends an installation."""

    def get_ext_filename(self, fullname: str) -> str:
        """Path of the library within the installed package."""
        return os.path.join(*fullname.split(".")[:-1], library.library_name(self._target()))

    def build_extension(self, ext: Extension) -> None:
        """Compile, or warn in one sentence."""
        output = Path(self.get_ext_fullpath(ext.name)).absolute()
        for other in output.parent.glob(f"{library.STEM}.*"):
            other.unlink()  # of an earlier build, maybe for another platform
        if library.is_unwanted():
            return
        try:
            library.compile_library(output, self._target())
        except library.CompileError as error:
            self.warn(f"the operations stay uncompiled, with the same results at less speed, because {error}")

    def copy_extensions_to_source(self) -> None:
        """Put the library beside the sources for an editable installation, where it may be in use or read-only."""
        try:
            super().copy_extensions_to_source()
        except FileError as error:
            self.warn(f"the operations stay as they were compiled before, if they were, because {error}")

    def get_output_mapping(self) -> dict[str, str]:
        """What lies beside the sources; setuptools does not expect that it may be nothing."""
        return {built: kept for built, kept in super().get_output_mapping().items() if os.path.exists(kept)}

    def _target(self) -> str | None:
        """Platform for which a wheel was asked with --plat-name, in zig's words."""
        _, name = self.distribution.get_option_dict("bdist_wheel").get("plat_name", ("", ""))
        return library.TARGETS.get(name)


class BuildWheel(bdist_wheel):
    """Tags the wheel for every Python 3, and for every platform if the library is not inside."""

    def get_tag(self) -> tuple[str, str, str]:
        """Tag by what was built."""
        *_, name = super().get_tag()
        if not any(Path(self.bdist_dir, *library.PACKAGE.split(".")).glob(f"{library.STEM}.*")):
            return "py3", "none", "any"
        return "py3", "none", name.replace("universal2", platform.machine())


def relative(paths: list[Path]) -> list[str]:
    """Paths as setuptools wants them."""
    return [path.relative_to(ROOT).as_posix() for path in paths]


# Where the sources may only be read, what comes up while building goes elsewhere.
scratch = None if os.access(ROOT, os.W_OK) else tempfile.TemporaryDirectory(prefix="mrcnn3d-")

setup(
    options={"build": {"build_base": scratch.name}, "egg_info": {"egg_base": scratch.name}} if scratch else {},
    ext_modules=[
        Extension(
            f"{library.PACKAGE}.{library.STEM}",
            sources=relative(library.sources()),
            depends=relative(library.dependencies()),
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": BuildWheel},
)
