"""Every operation and order against PyTorch's: times, ratios, rates and shares of the machine's ceilings.

    python -m bench.kernels [--groups batch-norm,lslr,norm-act-pool,conv,first-layer,head,dispatch]
                            [--device D] [--seconds S] [--passes N] [--json FILE]

Ours, PyTorch's and a copy of as many bytes take turns in one process; a time is a median, `noise` what two timings of
ours differ by. An operation whose result fails its check against float64 gets no time, and the exit status is 1.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from bench.cases import GROUPS, all_cases
from bench.harness import keep, machine, parser_of, peak_flops, rows


def describe(row: dict[str, Any]) -> str:
    name = f"{row['operation']:20} {row['order']:24} {row['size']:42} {row['layout']:13} {row['dtype']:9}"
    if "fault" in row:
        return f"{name} FAILS ITS CHECK: {row['fault']}"
    return (
        f"{name} {row['ours_us'][1]:9.1f} us, torch {row['torch_us'][1]:9.1f} us: {row['ratio']:5.2f} x "
        f"(noise {row['noise']:4.0%}) {row['gb_per_s']:6.1f} GB/s {row['share_of_copy']:4.0%} of copy "
        f"{row['gflop_per_s']:7.1f} GFLOP/s {row['share_of_peak']:5.0%} of peak, "
        f"{row['share_of_roof']:5.0%} of the roof"
    )


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--groups", default=",".join(GROUPS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each row and pass")
    parser.add_argument("--passes", type=int, default=1, help="through all rows, times pooled")
    arguments = parser.parse_args()
    torch.set_default_device(arguments.device)
    cases = list(all_cases(arguments.groups.split(",")))
    peak = peak_flops() / 1e9
    print(json.dumps(machine() | {"peak_gflop_per_s": peak}))
    found = []
    for row in rows(cases, arguments.seconds, arguments.passes):
        print(describe(row), flush=True)
        found.append(row)
        keep(arguments.json, found, peak_gflop_per_s=peak)
    return int(any("fault" in row for row in found))


if __name__ == "__main__":
    sys.exit(main())
