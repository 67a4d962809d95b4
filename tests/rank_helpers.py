"""Runs a function on several gloo ranks of this machine."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def on_ranks(size: int, work: Callable[..., Any], *arguments: Any, timeout: float = 60.0) -> list[Any]:
    """What ``work(*arguments)``, a function of a module, returns or raises on each of ``size`` processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mamlpp_fast.train"])
    with tempfile.TemporaryDirectory() as folder:
        processes, ends = [], []
        for rank in range(size):
            receive, send = context.Pipe(duplex=False)
            job = (rank, size, str(Path(folder) / "store"), timeout, work, arguments, send)
            processes.append(context.Process(target=_on_rank, args=job))
            ends.append(receive)
        for process in processes:
            process.start()
        results = [pickle.loads(end.recv_bytes()) if end.poll(timeout + 90) else "no answer" for end in ends]
        for process in processes:
            process.join(10)
            process.kill()
    return results


def _on_rank(
    rank: int,
    size: int,
    store: str,
    timeout: float,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
    send: Any,
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
    )
    try:
        result: Any = work(*arguments)
    except Exception as error:
        result = (type(error).__name__, str(error), traceback.format_exc())
    send.send_bytes(pickle.dumps(result))  # by value: shared memory would end with this process
    dist.destroy_process_group()
