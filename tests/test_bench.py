"""The benchmarks' own promises: what is wrong gets no time, and the GPU script survives a part that fails."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
import venv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mamlpp_fast as mf
from bench import gpu_equality, harness, iterations, load, plots, report, tables
from bench.__main__ import PARTS
from bench.cases import all_cases, conv
from bench.compare import compare
from bench.taken import what_is_taken
from mamlpp_fast.workloads import Workload

ROOT = Path(__file__).resolve().parents[1]


def _case(error: float) -> harness.Case:
    exact = torch.rand(64, dtype=torch.float64) + 1
    ours, theirs = (exact * (1 + error)).float(), exact.float()
    subjects = harness.Subjects(lambda: [ours], lambda: [theirs], lambda: [exact])
    return harness.Case("double", "forward", "[64]", "flat", "float32", lambda: subjects, 512, 64)


def test_weights_gradients_of_few_terms_pass_their_check() -> None:
    """Sums of 180: in Winograd's form one task of six was more than twice as far off as PyTorch."""
    shape = conv.SHAPES["omniglot 3x3"]
    for seed in range(3):
        torch.manual_seed(seed)
        subjects = conv.make("to weight", shape, torch.float32)
        assert harness.check(conv.case("to weight", "omniglot 3x3", shape, torch.float32), subjects) is None


def test_every_case_is_told_from_the_others() -> None:
    cases = list(all_cases())
    assert all(case.bytes > 0 and case.flops > 0 for case in cases)
    assert len({case.name for case in cases}) == len(cases)


def test_a_wrong_result_gets_no_time() -> None:
    right, wrong = harness.rows([_case(0.0), _case(1e-5)], 0.01, passes=2)
    assert "fault" not in right and right["ratio"] > 0 and right["ours_us"][0] <= right["ours_us"][2]
    assert "tensor 0" in wrong["fault"] and "ours_us" not in wrong


def test_an_engine_with_a_wrong_gradient_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = Workload("tiny", 2, 3, 1, 1, 16, 1, 4, steps=2)
    assert iterations.fault(tiny, "autograd", "float32", "cpu") is None
    update = mf.LSLR.forward

    def off_by(share: float, dtype: torch.dtype | None = None) -> Any:
        def forward(rates: mf.LSLR, params: Any, grads: Any, step: int) -> Any:
            off = 1 + share if dtype in (None, rates.rates.dtype) else 1.0
            return update(rates, params, {n: None if g is None else off * g for n, g in grads.items()}, step)

        return forward

    monkeypatch.setattr(mf.LSLR, "forward", off_by(1e-6))
    assert "float64 meta-gradient off by" in (iterations.fault(tiny, "autograd", "float32", "cpu") or "")
    monkeypatch.setattr(mf.LSLR, "forward", off_by(1e-2, torch.float32))
    assert "from float64's" in (iterations.fault(tiny, "autograd", "float32", "cpu") or "")


def bare_python(folder: Path) -> Path:
    """Python with this one's packages, but for what is installed of the project itself."""
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    # A path that a .pth file adds has its own .pth files, an editable installation's above all, left alone.
    (site / "others.pth").write_text(str(Path(torch.__file__).parents[1]))
    return folder / "bin" / "python"


def test_the_gpu_script_needs_no_installation_and_goes_on_after_a_part_that_fails(tmp_path: Path) -> None:
    python = bare_python(tmp_path / "bare")
    missing = subprocess.run(
        [python, "-c", "import mamlpp_fast"], cwd=tmp_path, env={}, capture_output=True, text=True
    )
    assert "No module named 'mamlpp_fast'" in missing.stderr
    command = ["bash", "bench/gpu.sh", "--tiny", "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(
        [*command, "no-such-part", "train", "first-step"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={
            "PYTHON": str(python),
            "PATH": "/usr/bin:/bin",
            "MAMLPP_FAST_NATIVE": "0",
            "HOME": str(tmp_path),
        },
    )
    assert done.returncode == 2, done.stdout + done.stderr
    summary = (tmp_path / "summary.txt").read_text()
    assert "no-such-part   FAILED 2" in summary and "first-step     ok" in summary
    assert "expected Omniglot's images by --data" in (tmp_path / "train.log").read_text()
    with tarfile.open(tmp_path / "all.tar.gz") as archive:
        assert {"./info.json", "./summary.txt", "./first-step.log"} <= set(archive.getnames())


def test_the_gpu_script_returns_an_archive_and_a_summary_from_a_lent_machine(tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OUT": str(tmp_path / "out")}
    command = ["bash", "bench/gpu.sh", "--tiny", "no-such-part", "train"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stdout + done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["all.tar.gz", "summary.txt"]
    with tarfile.open(tmp_path / "out" / "all.tar.gz") as archive:
        assert {"./no-such-part.log", "./train.log", "./summary.txt"} <= set(archive.getnames())


def test_the_gpu_scripts_parts_fit_its_nine_minutes() -> None:
    text = (ROOT / "bench" / "gpu.sh").read_text()
    (parts,) = re.findall(r"^\(\(\$\{#parts\[@\]\}\)\) \|\| parts=\((.*)\)$", text, re.MULTILINE)
    limits = {name: int(seconds) for name, seconds in re.findall(r"\[([a-z-]+)\]=(\d+)", text)}
    assert sum(limits[part] for part in parts.split()) <= 540


def test_one_failed_check_of_a_gpu_hides_no_other() -> None:
    def broken() -> str | None:
        raise RuntimeError("out of memory")

    assert gpu_equality.result(broken) == "RuntimeError: out of memory"
    assert gpu_equality.result(lambda: None) is None


def test_ceilings_are_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a GPU, where a product is timed for the peak, are not the CPU's."""
    seen: list[torch.device] = []

    def timed(jobs: dict[str, Any], *_: Any, **__: Any) -> dict[str, harness.Times]:
        class Devices(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                seen.append(args[0].device)
                return func(*args, **(kwargs or {}))

        with Devices():
            for job in jobs.values():
                job()
        return {name: harness.Times([1.0]) for name in jobs}

    monkeypatch.setattr(harness, "interleaved", timed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(harness, "captured", lambda job, *_: job)
    iterations.Ceilings("meta")
    assert seen == [torch.device("meta")] * 3


def test_two_runs_agree_within_the_spread_that_they_state() -> None:
    def run(low: float, median: float, high: float) -> dict[str, object]:
        return {"rows": [{"workload": "w", "engine": "e", "ms": [low, median, high]}]}

    ((name, same, ratio),) = compare(run(9, 10, 11), run(10, 11.5, 13))
    assert (name, same, ratio) == ("w e ms", True, 1.15)
    ((_, same, _),) = compare(run(9, 10, 11), run(12, 12.5, 13))
    assert not same
    ((_, same, _),) = compare(run(12, 12.5, 13), run(9, 10, 11))
    assert not same


def test_a_number_that_a_job_returns_is_no_time() -> None:
    times = harness.interleaved({"number": lambda: 1e9, "own": lambda: harness.Seconds(2.0)}, 0.0, at_least=1)
    assert times["number"].median < 1.0 and times["own"].median == 2.0
    assert harness.peak_flops() > 1e8


def test_a_ratio_is_taken_round_by_round() -> None:
    # The machine slowed down by half in the third round: times differ, the ratio does not.
    ours, theirs = harness.Times([1.0, 1.0, 1.5]), harness.Times([2.0, 2.0, 3.0])
    assert theirs.over(ours) == [2.0, 2.0, 2.0] and theirs.quartiles()[2] > 2.0


def test_peers_of_two_runs_agree_in_ratios_where_the_machine_slowed_down() -> None:
    def run(slowness: float) -> dict[str, object]:
        seconds = {"textbook": [1.0, 1.1, 1.2], "ours-fused": [0.5, 0.5, 0.6], "higher": []}
        rows = [{"peer": peer, "seconds": [slowness * t for t in taken]} for peer, taken in seconds.items()]
        return {
            "workloads": {
                "w": {"rows": [r | {"quartiles": r["seconds"]} if r["seconds"] else r for r in rows]}
            }
        }

    found = {name: same for name, same, _ in compare(run(1.0), run(1.5))}
    assert found == {
        "w textbook quartiles": False,
        "w ours-fused quartiles": False,
        "w ours-fused ratio_quartiles": True,
    }


def test_a_size_is_timed_against_the_unchanged_one(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = Workload("tiny", 2, 3, 1, 1, 16, 1, 4, steps=2)
    monkeypatch.setitem(iterations.WORKLOADS, "omniglot-5w1s", tiny)
    monkeypatch.setattr(iterations, "SCALING", {"tasks": [2, 8], "steps": [1, 2]})
    threads = torch.get_num_threads()
    rows = {
        (row["varies"], row["value"]): row
        for row in iterations.scaling("cpu", 0.01, 2, iterations.Ceilings("cpu"))
        if row["varies"] != "threads"
    }
    assert torch.get_num_threads() == threads
    assert list(rows) == [("tasks", 2), ("tasks", 8), ("steps", 1), ("steps", 2)]
    for unchanged in (("tasks", 2), ("steps", 2)):
        assert rows[unchanged]["ratio_quartiles"] == [1.0, 1.0, 1.0]
    assert rows["tasks", 8]["flops"] == 4 * rows["tasks", 2]["flops"]
    for (_, value), row in rows.items():
        assert row["ms_each"] == pytest.approx(row["ms"][1] / value)


def test_iterations_are_timed_beside_busy_processes() -> None:
    tiny = Workload("tiny", 2, 3, 1, 1, 16, 1, 4, steps=2)
    rows = load.under_load(tiny, [0, 1], 2)
    assert [row["busy"] for row in rows] == [0, 1]
    assert rows[0]["fused_growth"] == rows[0]["growth_ratio"] == 1
    assert all(row["fused_ms"][1] > 0 for row in rows)
    assert "tiny, 1 busy" in load.describe(rows)


def test_a_busy_process_outlives_no_benchmark_that_is_killed() -> None:
    code = "import os\nfrom bench.load import Neighbours\nNeighbours().set_busy(2)\nos._exit(7)"
    # Its output ends only when the last process that holds it, the busy ones among them, has ended.
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=120)
    assert done.returncode == 7, done.stderr


def test_the_page_shows_a_ratio_beside_that_of_the_second_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def content(ratio: float) -> str:
        row = {"varies": "tasks", "value": 8, "ms": [1.0, 2.0, 3.0], "ms_each": 0.25}
        return json.dumps({"rows": [row | {"ratio_quartiles": [ratio, ratio + 0.1, ratio + 0.2]}]})

    (tmp_path / "cpu" / "again").mkdir(parents=True)
    (tmp_path / "cpu" / "scaling.json").write_text(content(4.0))
    (tmp_path / "cpu" / "again" / "scaling.json").write_text(content(3.5))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    loaded = report.load("cpu", "scaling")
    assert loaded is not None
    assert "| 4.10 (4.00 to 4.20) | 3.60 (3.50 to 3.70) |" in tables.scaling(loaded["rows"])


def test_plots_follow_their_rows() -> None:
    rows = [
        {"workload": "w", "peer": peer, "quartiles": [low, low + 0.01, low + 0.02]}
        for peer, low in (("textbook", 0.5), ("ours-fused", 0.1))
    ]
    drawn = plots.peers(rows)
    assert drawn == plots.peers(rows) and b"ours-fused" in drawn
    assert drawn != plots.peers([rows[0], rows[1] | {"quartiles": [0.2, 0.21, 0.22]}])


def test_pages_show_the_newest_full_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, date, files in (
        ("cpu-old", None, report.FULL_SET),
        ("cpu-new", "2026-02-01", report.FULL_SET),
        ("cpu-newer", "2026-03-01", report.FULL_SET[:2]),
    ):
        (tmp_path / name).mkdir()
        machine = {} if date is None else {"date": date}
        for file in files:
            content = {"machine": machine, "rows": [], "workloads": {}}
            (tmp_path / name / f"{file}.json").write_text(json.dumps(content))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    report.shown.cache_clear()
    try:
        assert report.shown() == "cpu-new"
    finally:
        report.shown.cache_clear()


def test_a_page_or_plot_that_differs_is_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    # Another test may have added rules to the table of this page, in this process.
    monkeypatch.setattr(report, "PAGES", [page for page in report.PAGES if page != "docs/engine.md"])
    monkeypatch.setitem(report.PLOTS, "peers", ("peers", lambda rows: b"other"))
    monkeypatch.setitem(report.TABLES, "headline", ("iterations", lambda rows: "| other |"))
    assert report.stale(write=False) == ["README.md", "docs/images/peers.svg"]


def test_every_row_of_what_is_taken_has_names_and_words() -> None:
    """``python -m bench.report`` writes it into ``docs/engine.md``."""
    made = what_is_taken()
    rows = [line.strip("|").split(" | ") for line in made.splitlines() if line.startswith("| `")]
    assert len(rows) > 10 and all(names.strip() and takes.strip() for names, takes in rows)
    assert all(name in made for name in ("`conv2d`", "`dropout2d`", "`linear`", "`*`", "`gru`"))


@pytest.mark.parametrize("name", PARTS)
def test_every_part_is_a_command_that_exists(name: str) -> None:
    for arguments in filter(None, (PARTS[name].arguments, PARTS[name].quick)):
        _, module, *options = arguments.format(out="DIR").split()
        source = (ROOT / module.replace(".", "/")).with_suffix(".py")
        if module == "bench.peers":
            source = ROOT / "bench/peers/driver.py"
        text = source.read_text().replace("parser_of(__doc__)", '"--json"')  # which it has
        for option in options:
            assert not option.startswith("--") or f'"{option}"' in text
