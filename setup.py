"""Runs CMake for iv2kernels._C; everything else is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        out = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        # A kept cache would point at the cmake, ninja and Python of an isolated build that is gone.
        shutil.rmtree(build, ignore_errors=True)
        build.mkdir(parents=True)
        # What an interrupted build of a wheel leaves would stop the next one.
        for stale in (Path(__file__).resolve().parent / "build").glob("bdist.*"):
            shutil.rmtree(stale, ignore_errors=True)
        configure = [
            "cmake",
            f"-S{Path(__file__).resolve().parent}",
            f"-B{build}",
            "-GNinja",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={out}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_BUILD_TYPE={os.environ.get('IV2_BUILD_TYPE', 'Release')}",
            f"-DIV2_WERROR={os.environ.get('IV2_WERROR', 'OFF')}",
            f"-DIV2_SANITIZE={os.environ.get('IV2_SANITIZE', 'OFF')}",
            f"-DIV2_ISAS={os.environ.get('IV2_ISAS', '')}",  # e.g. avx2, for a quicker build
            f"-DIV2_CUDA={os.environ.get('IV2_CUDA', 'auto')}",
            f"-DIV2_CUDA_ARCHS={os.environ.get('IV2_CUDA_ARCHS', '80')}",  # e.g. 80;90a
        ]
        subprocess.check_call(configure)
        subprocess.check_call(["cmake", "--build", str(build)])


setup(ext_modules=[Extension("iv2kernels._C", [])], cmdclass={"build_ext": CMakeBuild})
