"""Package folders, C++ sources beside the code, an optional build at install; pyproject.toml has all else."""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


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


class BuildPy(build_py):
    """Adds ``mamlpp_fast/_src`` (CMakeLists.txt, csrc/) to a wheel; an editable install uses the checkout."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "mamlpp_fast" / "_src"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(ROOT / "csrc", target / "csrc")
            shutil.copy2(ROOT / "CMakeLists.txt", target / "CMakeLists.txt")
        if os.environ.get("MAMLPP_FAST_BUILD") == "1":
            build_native()


setup(
    packages=[*find_packages(include=["mamlpp_fast", "mamlpp_fast.*"]), "mamlpp_fast.kernels"],
    package_dir={"mamlpp_fast.kernels": "kernels"},
    package_data={"mamlpp_fast": ["py.typed"], "mamlpp_fast.report": ["page.css", "page.js"]},
    cmdclass={"build_py": BuildPy},
)
