"""Builds `ito_kernels._native` with CMake; the metadata is in pyproject.toml.

The extension does not use torch, so neither does its build. Without a C++ compiler the package
installs all the same and `ito_kernels.backends()` says what is missing; a compiler that fails is
an error.

The CUDA kernels, which double the compilation, are built where the installed torch is a CUDA build
and there is nvcc: $CUDACXX, the PATH, or the package nvidia-cuda-nvcc. ITO_BUILD_CUDA=0 leaves them
out, 1 builds them whatever torch is, and makes a missing nvcc an error. ITO_CUDA_ARCHS lists the
GPUs, as in CMAKE_CUDA_ARCHITECTURES; "all" is what wheels are built for. The build prints what it
decided, and why (`pip install -v` shows it).
"""

import os
import re
import shutil
import site
import subprocess
import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def compiler() -> str | None:
    """The C++ compiler CMake will use: $CXX, or the first usual name on the PATH."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name.split()[0]))), None)


# Machine code runs on later GPUs of the same major version. PTX runs on every later GPU; of the
# newest architecture alone, so that the driver need not compile what there is machine code for.
CUDA_ARCHS = "80-real;90-real;100-real;120"
ALL_CUDA_ARCHS = "80-real;86-real;89-real;90-real;100-real;120"


def nvcc() -> str | None:
    if wanted := os.environ.get("CUDACXX"):
        return shutil.which(wanted)
    package = find_spec("nvidia")
    roots = package.submodule_search_locations if package else []
    packaged = (path for root in roots for path in Path(root).glob("cu*/bin/nvcc"))
    return shutil.which("nvcc") or next(map(str, packaged), None)


def site_folders() -> list[str]:
    """Where packages are installed for this Python, the user's first, as in `sys.path`.

    The user's count although pip switches them off for its build (PYTHONNOUSERSITE); but not in a
    virtual environment that sees only its own packages.
    """
    user = [site.getusersitepackages()] if sys.base_prefix in site.PREFIXES else []
    return user + site.getsitepackages()


def wants_cuda(paths: list[str]) -> tuple[bool, str]:
    """Whether the torch in `paths` is a CUDA build, and what it is. pip builds in an environment of
    its own, where torch cannot be imported: its version file is read."""
    torch = PathFinder.find_spec("torch", paths)
    if torch is None or torch.origin is None:
        return False, f"there is no torch in {', '.join(site_folders())}"
    text = Path(torch.origin).with_name("version.py").read_text()
    found = dict(re.findall(r"^(__version__|cuda)\b[^=]*= *'(.+)'", text, re.MULTILINE))
    build = f"a build for CUDA {found['cuda']}" if "cuda" in found else "not a CUDA build"
    return "cuda" in found, f"torch {found['__version__']} is {build}"


def cuda_options() -> tuple[list[str], str]:
    """CMake's, for what ITO_BUILD_CUDA and ITO_CUDA_ARCHS ask for; what was decided, and why."""
    asked = os.environ.get("ITO_BUILD_CUDA", "auto")
    if asked not in ("auto", "0", "1"):
        raise ValueError(f"ITO_BUILD_CUDA must be auto, 0 or 1, got {asked!r}")
    wanted, why = asked == "1", f"ITO_BUILD_CUDA={asked}"
    if asked == "auto":
        wanted, why = wants_cuda([*sys.path, *site_folders()])
    found = nvcc()
    no_nvcc = "there is no nvcc ($CUDACXX, the PATH, nvidia-cuda-nvcc)"
    if asked == "1" and found is None:
        raise RuntimeError(f"{why}, but {no_nvcc}")
    if not wanted:
        hint = "; ITO_BUILD_CUDA=1 builds them" if asked == "auto" else ""
        return ["-DITO_CUDA=OFF"], f"CUDA kernels: not built: {why}{hint}"
    if found is None:
        return ["-DITO_CUDA=OFF"], f"CUDA kernels: not built: {why}, but {no_nvcc}"
    archs = os.environ.get("ITO_CUDA_ARCHS") or CUDA_ARCHS
    archs = ALL_CUDA_ARCHS if archs == "all" else archs
    for arch in archs.split(";"):
        number = re.fullmatch(r"(\d+)[af]?(-real|-virtual)?", arch)
        if arch != "native" and (number is None or int(number[1]) < 80):
            raise ValueError(
                f"ITO_CUDA_ARCHS must name 80 and later, or be all or native: {arch!r}"
            )
    options = [
        "-DITO_CUDA=ON",
        f"-DCMAKE_CUDA_COMPILER={found}",
        f"-DCMAKE_CUDA_ARCHITECTURES={archs}",
    ]
    return options, f"CUDA kernels: built for {archs} with {found}: {why}"


def environment() -> dict[str, str]:
    """Where the linker finds the runtime of a packaged nvcc: not in lib64, where nvcc looks."""
    paths = [str(Path(nvcc()).resolve().parent.parent / "lib")] if nvcc() else []
    paths += filter(None, [os.environ.get("LIBRARY_PATH")])
    return os.environ | ({"LIBRARY_PATH": os.pathsep.join(paths)} if paths else {})


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        if compiler() is None:
            print(
                "ito_kernels: no C++ compiler found ($CXX, c++, g++, clang++): installing"
                " without the native kernels; the pure PyTorch backend serves.",
                file=sys.stderr,
            )
            return
        import pybind11

        cuda, decision = cuda_options()
        print("C++ kernels: built, in about a minute of processor time")
        print(decision, flush=True)  # before CMake's own lines
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *cuda,
        ]
        for command in (configure, ["cmake", "--build", str(build)]):
            if subprocess.run(command, env=environment()).returncode:
                sys.exit("ito_kernels: the native kernels could not be built: see CMake's message")


setup(
    # optional: an install without a compiler leaves no file behind to copy
    ext_modules=[Extension("ito_kernels._native", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
