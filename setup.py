"""Package folders, C++ sources beside the code, libraries for a wheel; pyproject.toml has all else.

``MAMLPP_FAST_TORCHES`` names folders of torch packages, of several versions at will, as PATH names folders: a wheel
then has the native library inside, for each of them and for all processors. It needs cmake, ninja and a compiler.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
TORCHES = [Path(p) for p in os.environ.get("MAMLPP_FAST_TORCHES", "").split(os.pathsep) if p]


def build_native() -> None:
    """Fills the user's cache with the library, if this environment has torch; otherwise first use does."""
    if importlib.util.find_spec("torch") is None:
        print("mamlpp_fast: no torch here; native kernels are built on first use", file=sys.stderr)
        return
    spec = importlib.util.spec_from_file_location("_native", ROOT / "mamlpp_fast" / "_native.py")
    assert spec is not None
    assert spec.loader is not None
    native = importlib.util.module_from_spec(spec)
    sys.modules["_native"] = native
    spec.loader.exec_module(native)
    native.build()


def build_libraries(target: Path) -> None:
    """A library for each of TORCHES, as ``target/MAJOR.MINOR/libmamlpp_fast.so``; their kernels are compiled once.

    Torch's C++ interface stays the same between releases of one minor version. The one that it keeps stable for longer
    has neither functions of autograd nor classes, which two of our files need.
    """
    # The package depends on cmake and ninja, so that an environment with torch has them mostly.
    path = os.pathsep.join([*(str(t.parents[3] / "bin") for t in TORCHES), os.environ.get("PATH", "")])
    cmake, ninja = (shutil.which(tool, path=path) for tool in ("cmake", "ninja"))
    if cmake is None or ninja is None:
        sys.exit("MAMLPP_FAST_TORCHES: expected cmake and ninja on PATH or beside a torch")
    # A build that pip keeps apart names its packages by this: the cmake of another environment would not find its own.
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as work:
        for torch in TORCHES:
            version = re.search(r"__version__ = '(\d+\.\d+)", (torch / "version.py").read_text())
            if version is None:
                sys.exit(f"MAMLPP_FAST_TORCHES: expected the folder of a torch package, got {torch}")
            folder = target / version[1]
            folder.mkdir(parents=True, exist_ok=True)
            configure = [cmake, "-S", str(ROOT), "-B", work, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
            # What was found of the torch before is not this one's.
            configure += ["-DCMAKE_UNITY_BUILD=ON", "-ULIB_*", f"-DTORCH_ROOT={torch}"]
            build = [cmake, "--build", work]
            install = [cmake, "--install", work, "--strip", "--prefix", str(folder)]
            for command in (configure, build, install):
                subprocess.run(command, check=True, env=outside)


class BuildPy(build_py):
    """Adds ``mamlpp_fast/_src`` (CMakeLists.txt, csrc/) to a wheel; an editable install uses the checkout."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "mamlpp_fast" / "_src"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(ROOT / "csrc", target / "csrc")
            shutil.copy2(ROOT / "CMakeLists.txt", target / "CMakeLists.txt")
        if TORCHES and not self.editable_mode:
            build_libraries(Path(self.build_lib) / "mamlpp_fast" / "_lib")
        if os.environ.get("MAMLPP_FAST_BUILD") == "1":
            build_native()


class Wheel(bdist_wheel):
    """Of one platform where there is a library in it; of any Python, whose interface that does not use."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = not TORCHES

    def get_tag(self) -> tuple[str, str, str]:
        *_, platform = super().get_tag()
        return "py3", "none", platform


setup(
    packages=[*find_packages(include=["mamlpp_fast", "mamlpp_fast.*"]), "mamlpp_fast.kernels"],
    package_dir={"mamlpp_fast.kernels": "kernels"},
    package_data={"mamlpp_fast": ["py.typed"], "mamlpp_fast.report": ["page.css", "page.js"]},
    cmdclass={"build_py": BuildPy, "bdist_wheel": Wheel},
)
