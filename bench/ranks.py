"""Two and three gloo ranks on one machine against one process: training, going on, a killed rank.

    python -m bench.ranks [--iterations 50] [--out results/ranks]

Writes OUT.json and OUT.md. Exits with 1 where float64 differs by more than 1e-9, a resumed run by more than 1e-8, or a
killed rank leaves anything but an error status, one line and a whole checkpoint.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.harness import machine, parser_of
from mamlpp_fast.engine import Precision
from mamlpp_fast.train import build_learner, load_checkpoint, load_data, make_sampler, preset

PRESET = "strokes-5w1s"
SETTINGS = {"filters": 16}
SHOWN = (1, 5, 10, 25, 50)
RUN = ["strokes-5w1s", "--engine", "fused", "--device", "cpu", "--precision", "float64", "--set"]
RUN += ["filters=12", "tasks=6", "epochs=3", "iterations_per_epoch=10", "msl_epochs=2", "val_tasks=24"]
RUN += ["test_tasks=24", "checkpoint_seconds=0.2"]

Trace = dict[str, list[torch.Tensor]]


def trained(precision: Precision, iterations: int, reverse: bool = False) -> Trace:
    """Losses [iterations] and, after the iterations of SHOWN, parameters with rates and running statistics."""
    torch.set_num_threads(1)
    group = dist.group.WORLD if dist.is_initialized() else None
    config = preset(PRESET, SETTINGS)
    data = load_data(config, None)
    sampler = make_sampler(config, data, "train", torch.device("cpu"), precision)
    learner = build_learner(
        config, data.channels, data.image_size, engine="fused", precision=precision, process_group=group
    )
    trace: Trace = {"loss": [], "parameters": [], "statistics": []}
    for i in range(iterations):
        batch = sampler.batch(i * config.tasks, config.tasks)
        if reverse:
            batch = type(batch)(*(t.flip(0) for t in vars(batch).values()))
        trace["loss"].append(learner.meta_step(batch).loss.clone())
        if i + 1 in SHOWN:
            modules = (learner.model, learner.rates)
            parameters = [p.detach().flatten() for m in modules for p in m.parameters()]
            trace["parameters"].append(torch.cat(parameters))
            trace["statistics"].append(torch.cat([b.flatten() for b in learner.model.buffers()]))
    return trace


def on_rank(rank: int, size: int, store: str, job: tuple[Any, ...], send: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    trace = trained(*job)
    send.send({k: [t.tolist() for t in values] for k, values in trace.items()})
    dist.destroy_process_group()


def on_ranks(size: int, *job: Any) -> list[Trace]:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(size)]
        for rank, (_, send) in enumerate(pipes):
            job_of_rank = (rank, size, f"{folder}/store", job, send)
            context.Process(target=on_rank, args=job_of_rank).start()
        found = [receive.recv() for receive, _ in pipes]
    dtype = torch.float64
    return [{k: [torch.tensor(v, dtype=dtype) for v in values] for k, values in f.items()} for f in found]


def off(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference relative to the largest value."""
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())


def equality(precision: Precision, iterations: int) -> list[dict[str, Any]]:
    one = trained(precision, iterations)
    noise = trained(precision, iterations, reverse=True)
    two = on_ranks(2, precision, iterations)
    same = all(torch.equal(a, b) for key in one for a, b in zip(two[0][key], two[1][key], strict=True))
    rows = []
    for row, i in enumerate(n for n in SHOWN if n <= iterations):
        rows.append(
            {
                "what": "equality",
                "precision": precision,
                "iterations": i,
                "loss": max(off(a, b) for a, b in zip(two[0]["loss"][:i], one["loss"][:i], strict=True)),
                "parameters": off(two[0]["parameters"][row], one["parameters"][row]),
                "statistics": off(two[0]["statistics"][row], one["statistics"][row]),
                "reversed_loss": max(
                    off(a, b) for a, b in zip(noise["loss"][:i], one["loss"][:i], strict=True)
                ),
                "reversed_parameters": off(noise["parameters"][row], one["parameters"][row]),
                "ranks_equal_bitwise": same,
            }
        )
    return rows


def started(ranks: int, out: Path, *more: str) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *(launcher if ranks > 1 else []), "-m", "mamlpp_fast", "train", *RUN]
    return subprocess.Popen(
        [*command, "--out", str(out), *more],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(ranks: int, out: Path, *more: str) -> None:
    process = started(ranks, out, *more)
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(errors)


def state_of(out: Path) -> torch.Tensor:
    learner = load_checkpoint(out / "checkpoints" / "latest.pt", "training")["learner"]
    return torch.cat([t.flatten() for part in ("model", "rates") for t in learner[part].values()])


def resumed(folder: Path) -> dict[str, Any]:
    finished(1, folder / "whole")
    for ranks, until in ((2, 8), (1, 17), (3, 30)):
        finished(ranks, folder / "parts", "--max-iters", str(until))
    summaries = [json.loads((folder / n / "summary.json").read_text()) for n in ("parts", "whole")]
    return {
        "what": "resume",
        "ranks": [2, 1, 3],
        "until": [8, 17, 30],
        "state": off(state_of(folder / "parts"), state_of(folder / "whole")),
        "test_accuracy": [s["test_accuracy"] for s in summaries],
        "test_loss": [s["test_loss"] for s in summaries],
    }


def worker(process: subprocess.Popen[str], rank: int) -> int:
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise SystemExit(f"rank {rank} is not running")


def killed(folder: Path, rank: int) -> dict[str, Any]:
    out = folder / f"killed-{rank}"
    process = started(2, out)
    latest = out / "checkpoints" / "latest.pt"
    while not latest.exists() and process.poll() is None:
        time.sleep(0.05)
    os.kill(worker(process, rank), signal.SIGKILL)
    begun = time.perf_counter()
    _, errors = process.communicate()
    seconds = time.perf_counter() - begun
    told = [line for line in errors.splitlines() if line.startswith("mamlpp-fast")]
    reached = load_checkpoint(latest, "training")["learner"]["iteration"]
    return {
        "what": "killed",
        "rank": rank,
        "status": process.returncode,
        "seconds": round(seconds, 2),
        "told": [line.replace(str(folder), "RUN") for line in told],
        "checkpoint_iteration": reached,
    }


def page(about: dict[str, Any], rows: list[dict[str, Any]], command: str) -> str:
    lines = [
        "# Several ranks against one process",
        "",
        f"`{command}` on {about['cpu']}; torch {torch.__version__}, gloo. `{PRESET}` with 16 filters, "
        "8 tasks, fused engine, 2 ranks; largest difference from one process relative to the largest value, so far "
        "(losses) or then (the others). "
        "Beside it one process that takes the tasks in reverse order: what the order of summation alone does.",
        "",
        "| precision | iterations | loss | parameters, rates | running statistics | reversed: loss | parameters |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in (r for r in rows if r["what"] == "equality"):
        figures = ("loss", "parameters", "statistics", "reversed_loss", "reversed_parameters")
        shown = " | ".join(f"{r[k]:.1e}" for k in figures)
        lines.append(f"| {r['precision']} | {r['iterations']} | {shown} |")
    same = all(r["ranks_equal_bitwise"] for r in rows if r["what"] == "equality")
    lines += ["", f"Both ranks hold the same bits: {'yes' if same else 'no'}.", ""]
    for r in (r for r in rows if r["what"] == "resume"):
        lines += [
            "A run in float64 begun by 2 ranks, continued by 1 process from iteration 8 and by 3 ranks from 17 to 30, "
            f"against one process throughout: parameters and statistics differ by {r['state']:.1e}, test accuracy "
            f"{r['test_accuracy'][0]:.4f} and {r['test_accuracy'][1]:.4f}.",
            "",
        ]
    for r in (r for r in rows if r["what"] == "killed"):
        lines += [
            f"SIGKILL to rank {r['rank']} of 2 under torchrun: ended after {r['seconds']} s with status "
            f"{r['status']}, checkpoint whole at iteration {r['checkpoint_iteration']}; the other rank says:",
            "",
            *(f"    {line}" for line in r["told"]),
            "",
        ]
    return "\n".join(lines)


def main() -> int:
    parser = parser_of(__doc__, json=False)
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("results/ranks"))
    options = parser.parse_args()
    about, rows = machine(), []
    command = f"python -m bench.ranks --iterations {options.iterations}"

    def keep(found: list[dict[str, Any]]) -> None:
        """After every part, so that a run cut short leaves what it has."""
        rows.extend(found)
        print(json.dumps(found[-1]), flush=True)
        content = {"command": command, "machine": about, "rows": rows}
        options.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(page(about, rows, command))

    for precision in ("float64", "float32"):
        keep(equality(precision, options.iterations))
    with tempfile.TemporaryDirectory() as name:
        keep([resumed(Path(name))])
        for rank in (0, 1):
            keep([killed(Path(name), rank)])
    exact = all(
        max(r["loss"], r["parameters"], r["statistics"]) < 1e-9
        for r in rows
        if r["what"] == "equality" and r["precision"] == "float64"
    )
    on = all(r["state"] < 1e-8 for r in rows if r["what"] == "resume")
    clean = all(r["status"] == 1 and len(r["told"]) == 1 for r in rows if r["what"] == "killed")
    return 0 if exact and on and clean else 1


if __name__ == "__main__":
    sys.exit(main())
