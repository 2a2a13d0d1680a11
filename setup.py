"""Builds `ito_kernels._native` with CMake; the metadata is in pyproject.toml.

The extension does not use torch, so neither does its build. Without a C++ compiler the package
installs all the same and `ito_kernels.backends()` says what is missing; a compiler that fails is
an error.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def compiler() -> str | None:
    """The C++ compiler CMake will use: $CXX, or the first usual name on the PATH."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name.split()[0]))), None)


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

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


setup(
    # optional: an install without a compiler leaves no file behind to copy
    ext_modules=[Extension("ito_kernels._native", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
