"""Holds ``auto`` against a textbook loop on thousands of random models, and counts which engine served them.

    python -m bench.random_models [--models 10000] [--start 0] [--out results/random_models]

Each model of ``tests/random_programs.py`` is one line of ``OUT/models.jsonl``; ``OUT/summary.json`` has the counts, why
models were not fused, and what was wrong, by seed. Interrupted, the same command goes on; a model that ends the
process counts as wrong. At lowest priority, on one thread. Exits with 1 where anything is wrong;
``python -m tests.random_models SEED`` then shows the model.
"""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from bench.harness import machine, parser_of
from tests.random_models import TOLERANCE, check
from tests.random_programs import make_program


def summary(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Counts by engine, why models were not fused, features with their engines, and what was wrong."""
    rows = list(rows)
    engines = Counter(r["engine"] for r in rows)
    features: dict[str, Counter[str]] = {}
    for r in rows:
        for feature in r["features"] or ["plain"]:
            features.setdefault(feature, Counter())[r["engine"]] += 1
    return {
        "models": len(rows),
        "wrong": sum(bool(r["wrong"]) for r in rows),
        "tolerance": TOLERANCE,
        "engines": dict(engines.most_common()),
        "share_fused": engines["fused"] / max(len(rows), 1),
        "plain": dict(Counter(r["engine"] for r in rows if r["plain"])),
        "not_fused": dict(
            Counter(_kind(r["reason"]) for r in rows if r["engine"] == "autograd").most_common()
        ),
        "features": {name: dict(count) for name, count in sorted(features.items())},
        "failures": {r["seed"]: r["wrong"] for r in rows if r["wrong"]},
    }


def _kind(reason: str) -> str:
    """A reason without the names and numbers of one model."""
    text = re.sub(r"^not fused: [^:]*: ", "", reason)
    return re.sub(r"\b[a-z_]+\d+\w*(\.\w+)*|\d+", "…", text)


def main() -> int:
    parser = parser_of(__doc__, json=False)
    parser.add_argument("--models", type=int, default=10_000)
    parser.add_argument("--start", type=int, default=0, help="first seed")
    parser.add_argument("--out", type=Path, default=Path("results/random_models"))
    options = parser.parse_args()
    os.nice(19)
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    options.out.mkdir(parents=True, exist_ok=True)
    lines, current = options.out / "models.jsonl", options.out / "current"
    found = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    rows = {row["seed"]: row for row in found}
    seeds = range(options.start, options.start + options.models)
    with lines.open("a") as log:
        for done, seed in enumerate(seeds):
            if seed not in rows:
                ended = current.exists() and current.read_text() == str(seed)
                current.write_text(str(seed))
                rows[seed] = _ended(seed) if ended else check(seed).as_dict()
                log.write(json.dumps(rows[seed], ensure_ascii=False) + "\n")
                log.flush()
                for what in rows[seed]["wrong"][:1]:
                    print(f"seed {seed}, {rows[seed]['engine']}: {what}", flush=True)
            if (done + 1) % 100 == 0:
                asked = [rows[s] for s in seeds[: done + 1]]
                fused = sum(r["engine"] == "fused" for r in asked)
                print(
                    f"{done + 1} models, {fused} fused, {sum(bool(r['wrong']) for r in asked)} wrong",
                    flush=True,
                )
    current.unlink(missing_ok=True)
    result = summary(rows[s] for s in seeds)
    content = {"machine": machine(), "first_seed": options.start, **result}
    (options.out / "summary.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps({k: result[k] for k in ("models", "wrong", "engines", "share_fused")}))
    return 1 if result["wrong"] else 0


def _ended(seed: int) -> dict[str, Any]:
    program = make_program(seed)
    wrong = ["the process ended in this model"]
    about = {"engine": "none", "reason": "none", "features": program.features, "plain": program.plain}
    return {"seed": seed, **about, "wrong": wrong}


if __name__ == "__main__":
    sys.exit(main())
