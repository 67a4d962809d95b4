"""Two gloo ranks on one machine against one process, by the number of iterations.

    python -m bench.ranks [--iterations 50] [--out results/ranks]

Writes OUT.json and OUT.md. Exits with 1 where float64 differs by more than 1e-9. Runs that go on with another number of
ranks and ranks that are killed are judged by ``tests/test_distributed.py``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.harness import machine, parser_of
from mamlpp_fast.engine import Precision
from mamlpp_fast.train import build_learner, load_data, make_sampler, preset
from tests.rank_helpers import on_ranks

PRESET = "strokes-5w1s"
SETTINGS = {"filters": 16}
SHOWN = (1, 5, 10, 25, 50)

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


def off(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference relative to the largest value."""
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())


def equality(precision: Precision, iterations: int) -> list[dict[str, Any]]:
    one = trained(precision, iterations)
    noise = trained(precision, iterations, reverse=True)
    two = on_ranks(2, trained, precision, iterations, timeout=3600.0)
    same = all(torch.equal(a, b) for key in one for a, b in zip(two[0][key], two[1][key], strict=True))
    rows = []
    for row, i in enumerate(n for n in SHOWN if n <= iterations):
        rows.append(
            {
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
    for r in rows:
        figures = ("loss", "parameters", "statistics", "reversed_loss", "reversed_parameters")
        shown = " | ".join(f"{r[k]:.1e}" for k in figures)
        lines.append(f"| {r['precision']} | {r['iterations']} | {shown} |")
    same = all(r["ranks_equal_bitwise"] for r in rows)
    lines += ["", f"Both ranks hold the same bits: {'yes' if same else 'no'}.", ""]
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
    exact = [
        max(r["loss"], r["parameters"], r["statistics"]) < 1e-9 for r in rows if r["precision"] == "float64"
    ]
    return 0 if all(exact) else 1


if __name__ == "__main__":
    sys.exit(main())
