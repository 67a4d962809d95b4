"""Makes a wheel with the native library inside and shows it in use where no compiler is.

    python -m bench.wheel PYTHON [PYTHON ...] [--out DIR]

Each PYTHON is that of an environment with a torch, of versions of their own, and with this package's other
dependencies. The wheel gets a library for each of them; it is installed into a fresh environment that sees that
torch, and takes part in a meta-step there with nothing on PATH. Prints the wheel's size, and for each torch the
instruction set in use and how far the meta-gradient in float64 is from the reference's. Exits with 1 where the
kernels are not in use or that is more than 1e-9.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.harness import parser_of

ROOT = Path(__file__).resolve().parents[1]

_CHECK = """
import json, torch, mamlpp_fast as mf
from mamlpp_fast import _native
torch.manual_seed(0)
shape = 4, 10, 1, 28, 28
x, y, labels = torch.randn(shape), torch.randn(shape), torch.arange(5).repeat(4, 2)
batch = mf.EpisodeBatch(x, labels, y, labels)
grads = []
for engine in ("reference", "fused"):
    torch.manual_seed(1)
    learner = mf.MAMLPlusPlus(mf.Conv4(1, 5, filters=16), engine=engine, precision="float64")
    learner.meta_gradient(batch)
    grads.append(torch.cat([p.grad.flatten() for p in learner.model.parameters() if p.grad is not None]))
status = _native.status()
off = float((grads[1] - grads[0]).abs().max() / grads[0].abs().max())
print(json.dumps({"torch": torch.__version__, "loaded": status.loaded, "isa": status.isa, "off": off,
                  "reason": status.reason, "shipped": "_lib" in str(status.path)}))
"""


def packages(python: str) -> Path:
    """The site-packages that this Python finds torch in."""
    code = "import importlib.util; print(importlib.util.find_spec('torch').submodule_search_locations[0])"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return Path(done.stdout.strip()).parent


def make(sites: list[Path], folder: Path) -> Path:
    environment = os.environ | {"MAMLPP_FAST_TORCHES": os.pathsep.join(str(s / "torch") for s in sites)}
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, env=environment)
    (wheel,) = folder.glob("*.whl")
    return wheel


def check(wheel: Path, site: Path, python: str, folder: Path) -> dict[str, object]:
    """What a fresh environment says of itself that has the wheel and sees one of the torches."""
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    own = folder / "bin" / "python"
    command = [own, "-I", "-m", "pip", "install", "-q", "--no-deps", str(wheel)]
    subprocess.run(command, check=True)
    (found,) = folder.glob("lib/python*/site-packages")
    # Its .pth files, an editable installation's above all, are left alone.
    (found / "others.pth").write_text(str(site))
    done = subprocess.run(
        [own, "-c", _CHECK], cwd=folder, capture_output=True, text=True, env={"PATH": "", "HOME": str(folder)}
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    row: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return row


def main() -> int:
    parser = parser_of(__doc__, json=False)
    parser.add_argument("pythons", nargs="+", metavar="PYTHON")
    parser.add_argument("--out", type=Path, help="where the wheel is left")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        sites = [packages(python) for python in arguments.pythons]
        wheel = make(sites, arguments.out or Path(work) / "wheel")
        print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB", flush=True)
        wrong = 0
        for i, (python, site) in enumerate(zip(arguments.pythons, sites, strict=True)):
            row = check(wheel, site, python, Path(work) / str(i))
            right = row["loaded"] and row["shipped"] and float(str(row["off"])) <= 1e-9
            wrong += not right
            print("right" if right else "WRONG", json.dumps(row), flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
