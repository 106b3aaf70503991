"""Compiling the library and asking for a compiler, with compilers that are scripts which do as they are told."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import backend
import compile_library
from compile_library import CompileError, NoCompilerError
from napari_mrcnn3d._ops import _cpu

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the compilers are shell scripts")

GIVES_A_LIBRARY = 'for last; do :; done; printf whole >"$last"'
FAILS_HALFWAY = f"""{GIVES_A_LIBRARY}
case "$*" in *cpu_api.cpp*) printf half >"$last"; exit 1;; esac"""
LACKS_A_STATIC_RUNTIME = f"""case "$*" in *-static-libstdc++*) exit 1;; esac
{GIVES_A_LIBRARY}"""


@pytest.fixture(autouse=True)
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder of programs: empty, as is the environment of wishes about compiling; there is no zig."""
    folder = tmp_path / "programs of mine"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    for name in ("CXX", "NAPARI_MRCNN3D_NO_EXT", "ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(compile_library, "find_spec", lambda name: None)
    return folder


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Where a library is to be, in a folder with nothing else; an old one is there."""
    path = tmp_path / "library" / compile_library.library_name()
    path.parent.mkdir()
    path.write_text("old")
    return path


def make_program(path: Path, script: str) -> Path:
    """A program that notes its arguments in a file beside it, then runs the script."""
    path.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >"$0.arguments"\n{script}\n')
    path.chmod(0o755)
    return path


def arguments_of(program: Path) -> list[str]:
    return Path(f"{program}.arguments").read_text().splitlines()


@pytest.fixture
def zig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package ziglang that notes its arguments and cache, and gives a library."""
    note = tmp_path / "zig"
    package = tmp_path / "packages" / "ziglang.py"
    package.parent.mkdir()
    package.write_text(
        "import os, pathlib, sys\n"
        f"pathlib.Path({str(note)!r} + '.arguments').write_text('\\n'.join(sys.argv[1:]))\n"
        f"pathlib.Path({str(note)!r} + '.cache').write_text(os.environ['ZIG_GLOBAL_CACHE_DIR'])\n"
        "pathlib.Path(sys.argv[-1]).write_text('whole')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.setattr(compile_library, "find_spec", lambda name: name == "ziglang" or None)
    return note


# ---------------------------------------------------------------------------------------------- compiling


def test_the_library_has_the_name_that_the_package_looks_for() -> None:
    assert compile_library.library_name() == _cpu._LIBRARY.name


def test_every_source_is_compiled_for_any_processor_of_the_family(programs: Path, output: Path) -> None:
    compiler = make_program(programs / "c++", GIVES_A_LIBRARY)
    assert compile_library.compile_library(output).read_text() == "whole"
    assert list(output.parent.iterdir()) == [output]
    arguments = arguments_of(compiler)
    assert {str(path) for path in compile_library.sources()} <= set(arguments)
    assert len(compile_library.sources()) >= 3
    assert "-ffp-contract=off" in arguments
    assert not [one for one in arguments if one.startswith("-m")]


def test_a_compiler_that_fails_halfway_leaves_nothing_not_even_what_was_there(programs: Path, output: Path) -> None:
    make_program(programs / "g++", FAILS_HALFWAY)
    with pytest.raises(CompileError, match="failed with exit code 1") as caught:
        compile_library.compile_library(output)
    assert not isinstance(caught.value, NoCompilerError)
    assert not list(output.parent.iterdir())


def test_a_compiler_without_a_static_runtime_takes_the_shared_one(programs: Path, output: Path) -> None:
    compiler = make_program(programs / "c++", LACKS_A_STATIC_RUNTIME)
    compile_library.compile_library(output)
    assert "-static-libstdc++" not in arguments_of(compiler)


def test_the_first_compiler_that_works_is_taken(programs: Path) -> None:
    make_program(programs / "c++", "exit 1")
    make_program(programs / "g++", "exit 0")  # without a result
    clang = make_program(programs / "clang++", GIVES_A_LIBRARY)
    command = compile_library.find_compiler()
    assert command is not None
    assert command[0] == str(clang)


@pytest.mark.parametrize("arguments", ["", " -march=armv8-a 'with space'"])
def test_cxx_comes_first_and_may_have_arguments_or_a_space_in_its_path(
    programs: Path, output: Path, monkeypatch: pytest.MonkeyPatch, arguments: str
) -> None:
    make_program(programs / "c++", "exit 1")
    mine = make_program(programs / "my c++", GIVES_A_LIBRARY)
    monkeypatch.setenv("CXX", f"'{mine}'{arguments}" if arguments else str(mine))
    compile_library.compile_library(output)
    assert arguments_of(mine)[:2] == (["-march=armv8-a", "with space"] if arguments else compile_library.FLAGS[:2])


@pytest.mark.parametrize("cxx", ["", "no-such-compiler --fast"])
def test_no_compiler_is_said_in_a_sentence(output: Path, monkeypatch: pytest.MonkeyPatch, cxx: str) -> None:
    monkeypatch.setenv("CXX", cxx)
    with pytest.raises(NoCompilerError, match=cxx or "install one"):
        compile_library.compile_library(output)
    assert not output.exists()


def test_a_folder_that_cannot_be_made_is_said_in_a_sentence(programs: Path, output: Path) -> None:
    make_program(programs / "c++", GIVES_A_LIBRARY)
    with pytest.raises(CompileError, match="cannot be written"):
        compile_library.compile_library(output / "in a file" / output.name)


def test_zig_compiles_for_any_processor_and_leaves_no_cache(zig: Path, output: Path) -> None:
    compile_library.compile_library(output)
    assert output.read_text() == "whole"
    assert arguments_of(zig)[:2] == ["c++", "-mcpu=baseline"]  # by itself it compiles for the one at hand
    assert not Path(Path(f"{zig}.cache").read_text()).exists()


def test_zig_is_not_asked_where_there_is_a_compiler(programs: Path, zig: Path, output: Path) -> None:
    make_program(programs / "c++", GIVES_A_LIBRARY)
    compile_library.compile_library(output)
    assert not Path(f"{zig}.arguments").exists()


@pytest.mark.parametrize("target", compile_library.TARGETS.values())
def test_other_platforms_are_compiled_for_with_zig(programs: Path, zig: Path, tmp_path: Path, target: str) -> None:
    make_program(programs / "c++", "exit 1")
    compile_library.compile_library(tmp_path / compile_library.library_name(target), target)
    assert arguments_of(zig)[:3] == ["c++", "-target", target]
    suffix = {"linux": ".so", "windows": ".dll", "macos": ".dylib"}[target.split("-")[1].split(".")[0]]
    assert (tmp_path / f"_ops_cpu{suffix}").read_text() == "whole"


def test_a_platform_without_zig_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(NoCompilerError, match="ziglang"):
        compile_library.compile_library(tmp_path / "x.dll", "x86_64-windows-gnu")


@pytest.mark.parametrize(("script", "code"), [(GIVES_A_LIBRARY, 0), (FAILS_HALFWAY, 1), ("exit 1", 3)])
def test_exit_codes_tell_a_failure_from_a_missing_compiler(
    programs: Path, output: Path, monkeypatch: pytest.MonkeyPatch, script: str, code: int
) -> None:
    make_program(programs / "c++", script)
    monkeypatch.setattr(sys, "argv", ["compile_library.py", "--output", str(output)])
    assert compile_library.main() == code
    assert output.exists() == (code == 0)


def test_the_library_can_be_left_out(programs: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_program(programs / "c++", GIVES_A_LIBRARY)
    monkeypatch.setenv("NAPARI_MRCNN3D_NO_EXT", "1")
    monkeypatch.setattr(sys, "argv", ["compile_library.py", "--output", str(output)])
    assert compile_library.main() == 0
    assert output.read_text() == "old"


# ---------------------------------------------------------------------------------------------- build requirements


@pytest.fixture
def offers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where pip looks for packages; nothing is there."""
    folder = tmp_path / "offers"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_zig_is_required_where_there_is_no_compiler(offers: Path) -> None:
    (offers / "ziglang-0.17.0-py3-none-any.whl").touch()
    assert backend.compiler_requirements() == ["ziglang"]


def test_zig_is_not_required_where_pip_has_none(offers: Path) -> None:
    (offers / "ziglang-0.17.0-py3-none-other_system.whl").touch()
    assert backend.compiler_requirements() == []


def test_zig_is_required_where_another_installer_is_at_work(
    programs: Path, offers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = make_program(programs / "python", "exit 1")  # has no pip
    monkeypatch.setattr(sys, "executable", str(python))
    assert backend.compiler_requirements() == ["ziglang"]


def test_nothing_is_required_where_there_is_a_compiler(programs: Path) -> None:
    make_program(programs / "c++", GIVES_A_LIBRARY)
    assert backend.compiler_requirements() == []


def test_nothing_is_required_for_an_installation_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAPARI_MRCNN3D_NO_EXT", "1")
    assert backend.compiler_requirements() == []


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_wheels_and_editable_installations_add_the_compiler(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    hook = f"get_requires_for_build_{kind}"
    monkeypatch.setattr(backend.build_meta, hook, lambda settings: ["what setuptools needs"])
    monkeypatch.setattr(backend, "compiler_requirements", lambda: ["a compiler"])
    assert getattr(backend, hook)() == ["what setuptools needs", "a compiler"]


def test_source_archives_need_no_compiler() -> None:
    assert backend.get_requires_for_build_sdist is backend.build_meta.get_requires_for_build_sdist
