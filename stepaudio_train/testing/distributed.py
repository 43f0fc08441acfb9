"""Run a function in several processes that talk over gloo, and get its results or the failing rank's traceback.

What `torchrun` gives a program (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) is set for each process.
"""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import os
import pickle
import random
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class RankFailed(AssertionError):
    """A rank raised or died; the message holds its traceback."""


def run_distributed(
    function: Callable[..., T], world_size: int, *args: Any, timeout_s: float = 300.0, preload: Sequence[str] = ()
) -> list[T]:
    """Call `function(*args)` in `world_size` fresh processes; the results in rank order.

    Args:
        function: at the top of a module or a test file. It forms the process group itself; arguments and result have
            to be picklable.
        timeout_s: after this, or once a rank has failed, all processes are ended.
        preload: modules that the processes of this and of all later calls find imported. The first call decides.

    Raises:
        RankFailed: with the first failing rank's traceback.
        TimeoutError: naming the ranks that had not finished.
    """
    # Processes fork from a server that has imported the slow modules once, and has started no threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    port = _free_port()
    target = (function.__module__, function.__code__.co_filename, function.__qualname__)
    processes: list[BaseProcess] = []
    pipes: list[Connection] = []
    for rank in range(world_size):
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_entry, args=(send, rank, world_size, port, target, args))
        process.start()
        send.close()
        processes.append(process)
        pipes.append(receive)
    try:
        return _collect(pipes, time.monotonic() + timeout_s)
    except BaseException:
        # Ranks that wait for a failed one never end by themselves.
        for process in processes:
            process.kill()
        raise
    finally:
        for process in processes:
            process.join()


def _collect(pipes: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        open_pipes = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(open_pipes, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = [rank for rank in range(len(pipes)) if rank not in results]
            raise TimeoutError(f"ranks {missing} did not finish in time")
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                succeeded, value = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]  # noqa: S301, from our child
            except EOFError:
                raise RankFailed(f"rank {rank} died without a traceback") from None
            if not succeeded:
                raise RankFailed(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _entry(
    pipe: Connection, rank: int, world_size: int, port: int, target: tuple[str, str, str], args: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    try:
        result = _find(*target)(*args)
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
        # Leaving at once: other ranks may be in the middle of a collective, and a normal exit would wait for them.
        pipe.close()
        os._exit(1)
    # Not `send`, which hands tensors over in shared memory that goes away with this process.
    pipe.send_bytes(pickle.dumps((True, result)))
    pipe.close()


def _find(module_name: str, file: str, function_name: str) -> Callable[..., Any]:
    """The function, also out of a test file, which pytest imports under a name that nobody else can."""
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError:
        spec = importlib.util.spec_from_file_location(module_name, file)
        if spec is None or spec.loader is None:
            raise
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
    return getattr(module, function_name)


def _free_port() -> int:
    # Under the range that outgoing connections draw from: one of those may take a port before rank 0 listens on it.
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no free port among a hundred between 20000 and 32000")
