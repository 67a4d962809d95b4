"""Makes a virtual environment for each of the peers' libraries, with pinned versions, in a cache folder.

    python -m bench.peers.environments [--only NAME,...] [--missing]

``--missing`` leaves alone what is there as asked for. What could not be installed, and why, is recorded and printed;
the driver lists it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.harness import parser_of


@dataclass(frozen=True)
class Environment:
    """A virtual environment.

    Attributes:
        main: the package it is named for in the results, then the others that pip installs.
        sources: packages of which only the files of the source distribution are taken.
        cython: of those, the Cython files to compile where they lie.
    """

    packages: tuple[str, ...]
    sources: tuple[str, ...] = ()
    cython: tuple[str, ...] = ()


_TORCH = ("torch==2.13.0", "numpy==2.4.6")
_BUILDS = ("cython==0.29.37", "setuptools==80.9.0", "wheel==0.45.1")
_LOADS = ("scipy==1.17.1", "requests==2.32.5", "tqdm==4.70.1", "pillow==13.0.0")
ENVIRONMENTS = {
    "torch": Environment(_TORCH),
    "torchopt": Environment(("torchopt==0.7.3", *_TORCH)),
    "higher": Environment(("higher==0.2.1", *_TORCH)),
    # The C files it comes with do not compile for Python 3.11 or later: they are made anew.
    "learn2learn": Environment(
        (*_TORCH, *_BUILDS, *_LOADS), sources=("learn2learn==0.2.0",), cython=("learn2learn/data/*.pyx",)
    ),
    "jax": Environment(("jax==0.10.2", "numpy==2.4.6")),
}
_RECORD = "environment.json"


class _Failed(Exception):
    pass


def default_cache() -> Path:
    parent = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(parent) / "mamlpp_fast" / "peers"


def python_of(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def recorded(cache: Path, name: str) -> dict[str, Any]:
    """What making the environment came to: ``versions``, or the ``fault`` that stopped it."""
    path = cache / name / _RECORD
    if not path.exists():
        return {"fault": "not installed: run python -m bench.peers.environments"}
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()]
        # Results are published: no addresses or folders of this machine in them.
        raise _Failed(re.sub(r"(\w+:)?//?\S+/\S*", "...", (errors or lines or ["no message"])[0].strip()))
    return done.stdout


def _site(python: Path) -> Path:
    return Path(_run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())


def _compile(python: Path, pattern: str) -> None:
    """Compiles unpacked Cython files where they lie, their outdated C files set aside."""
    site = _site(python)
    for source in site.glob(pattern):
        source.with_suffix(".c").unlink(missing_ok=True)
        _run(python, "-m", "Cython.Build.Cythonize", "-i", source)


def _unpack(python: Path, requirement: str) -> None:
    """Puts the package of a source distribution where the environment finds it, and builds nothing."""
    name = requirement.partition("==")[0]
    site = _site(python)
    with tempfile.TemporaryDirectory() as folder:
        options = ["-q", "--no-deps", "--no-build-isolation", "--no-binary", ":all:", "-d"]
        _run(python, "-m", "pip", "download", *options, folder, requirement)
        archive = next(Path(folder).glob("*.tar.gz"))
        with tarfile.open(archive) as tar:
            root = archive.name.removesuffix(".tar.gz")
            for member in tar.getmembers():
                if member.name.startswith(f"{root}/{name}/"):
                    member.name = member.name.removeprefix(f"{root}/")
                    tar.extract(member, site, filter="data")


def make(cache: Path, name: str, environment: Environment) -> dict[str, Any]:
    """Makes the environment anew and records how it went."""
    folder = cache / name
    python = python_of(folder)
    try:
        _run(sys.executable, "-m", "venv", "--clear", folder)
        _run(python, "-m", "pip", "install", "-q", *environment.packages)
        for source in environment.sources:
            _unpack(python, source)
        for pattern in environment.cython:
            _compile(python, pattern)
        listed = json.loads(_run(python, "-m", "pip", "list", "--format", "json"))
        versions = {entry["name"]: entry["version"] for entry in listed}
        versions |= dict(source.split("==") for source in environment.sources)
        versions["python"] = ".".join(map(str, sys.version_info[:3]))
        record: dict[str, Any] = {"versions": versions, "fault": None}
    except _Failed as error:
        record = {"versions": {}, "fault": f"not installed: {error}"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _RECORD).write_text(json.dumps(record, indent=1) + "\n")
    return record


def _complete(cache: Path, name: str) -> bool:
    """Whether the environment has the versions that are asked for."""
    record, wanted = recorded(cache, name), ENVIRONMENTS[name]
    if record["fault"] is not None:
        return False
    pinned = (package.split("==") for package in (*wanted.packages, *wanted.sources))
    # A local part, as in 2.13.0+cpu, says how a version was built.
    return all(record["versions"].get(package, "").split("+")[0] == version for package, version in pinned)


def main() -> int:
    parser = parser_of(__doc__, json=False)
    parser.add_argument("--only", default=",".join(ENVIRONMENTS))
    parser.add_argument("--missing", action="store_true", help="only what is not there yet")
    arguments = parser.parse_args()
    cache, failed = default_cache(), False
    for name in arguments.only.split(","):
        if arguments.missing and _complete(cache, name):
            print(f"{name}: there already", flush=True)
            continue
        record = make(cache, name, ENVIRONMENTS[name])
        print(f"{name}: {record['fault'] or 'installed'}", flush=True)
        failed = failed or record["fault"] is not None
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
