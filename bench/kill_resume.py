"""Ends a training run by signals at random moments, resumes it each time, and compares it with an undisturbed one.

    python bench/kill_resume.py [--kills 10] [--signals KILL,TERM,INT] [--seed 0] [--folder DIR] [TRAIN ARGUMENTS ...]

Prints where each signal struck; exits with 1 if the summaries (times apart) or any checkpointed tensor differ by a bit.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.harness import parser_of
from mamlpp_fast.train import load_checkpoint

DEFAULT = "strokes --set filters=8 --set epochs=4 --set iterations_per_epoch=50 --set val_tasks=64 --set test_tasks=100"
TIMING = {"seconds", "seconds_per_iteration"}


def start(arguments: list[str], out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mamlpp_fast", "train", *arguments, "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(arguments: list[str], out: Path) -> None:
    process = start(arguments, out)
    output, _ = process.communicate()
    if process.returncode != 0:
        raise SystemExit(output)


def summary_of(out: Path) -> dict[str, Any]:
    content = json.loads((out / "summary.json").read_text())
    return {k: v for k, v in content.items() if k not in TIMING}


def tensors_of(out: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}

    def collect(prefix: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found[prefix] = value
        elif isinstance(value, dict):
            for key, inner in value.items():
                collect(f"{prefix}/{key}", inner)

    for path in sorted((out / "checkpoints").glob("*.pt")):
        kind = "training" if path.name == "latest.pt" else "model"
        collect(path.name, load_checkpoint(path, kind))
    return found


def main() -> int:
    parser = parser_of(__doc__, json=False)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--signals", default="KILL", help="drawn from: KILL, TERM, INT, separated by commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    options, arguments = parser.parse_known_args()
    arguments = arguments or DEFAULT.split()
    if not any(a.startswith("checkpoint_seconds=") for a in arguments):
        arguments += ["--set", "checkpoint_seconds=0.5"]
    folder = options.folder or Path(tempfile.mkdtemp())
    undisturbed, killed = folder / "undisturbed", folder / "killed"
    finish(arguments, undisturbed)
    seconds = json.loads((undisturbed / "summary.json").read_text())["seconds"]
    print(f"undisturbed: {seconds:.1f} s of training and testing", flush=True)
    rng = random.Random(options.seed)
    for kill in range(options.kills):
        process = start(arguments, killed)
        assert process.stdout is not None
        process.stdout.readline()  # the run has begun: a life is counted from here
        moment = rng.uniform(0, seconds / options.kills)
        time.sleep(moment)
        number = signal.Signals[f"SIG{rng.choice(options.signals.split(','))}"]
        process.send_signal(number)
        process.communicate()
        latest = killed / "checkpoints" / "latest.pt"
        reached = load_checkpoint(latest, "training")["learner"]["iteration"] if latest.exists() else 0
        done = "" if process.returncode in (-number, 128 + number) else f" (status {process.returncode})"
        print(
            f"{number.name} {kill + 1}: after {moment:.2f} s, checkpoint at iteration {reached}{done}",
            flush=True,
        )
    finish(arguments, killed)
    ours, theirs = tensors_of(killed), tensors_of(undisturbed)
    differing = [k for k in ours.keys() | theirs.keys() if k not in ours or k not in theirs]
    differing += [k for k in ours.keys() & theirs.keys() if not torch.equal(ours[k], theirs[k])]
    same_summary = summary_of(killed) == summary_of(undisturbed)
    print(f"summary {'equal' if same_summary else 'differs'}; {len(ours)} tensors, {len(differing)} differ")
    return 0 if same_summary and not differing else 1


if __name__ == "__main__":
    sys.exit(main())
