"""The same work on every core: forked processes of one thread each.

An operation of a small LM is too short to be divided: two threads decode 1.3 times as fast as one, two processes of one
thread 1.8 times. A fork sees the model where it is, without loading or copying it.
"""

import ctypes
import multiprocessing
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import TypeVar

import torch

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
Part = TypeVar("Part")
Result = TypeVar("Result")


def cores(device: torch.device) -> int:
    """Processes that can share the work of a model on `device`: torch's threads on a CPU under Linux, one elsewhere."""
    return torch.get_num_threads() if device.type == "cpu" and sys.platform == "linux" else 1


def each(work: Callable[[Part], Result], parts: Sequence[Part], *, device: torch.device) -> list[Result]:
    """`work` of each part, in the order of the parts, by as many processes as there are `cores`, this one included.

    Processes take parts from the front as they come free, so longer parts belong there. What `work` changes in memory
    is lost, but for what it gives. Raises RuntimeError with the traceback of a part that failed elsewhere, or when a
    process was killed.
    """
    threads = torch.get_num_threads()
    processes = min(cores(device), len(parts))
    if processes < 2:
        return [work(part) for part in parts]
    context = multiprocessing.get_context("fork")
    taken = context.Value("i", 0)

    def share() -> dict[int, Result]:
        done: dict[int, Result] = {}
        while True:
            with taken:
                index, taken.value = taken.value, taken.value + 1
            if index >= len(parts):
                return done
            done[index] = work(parts[index])

    def child(end: Connection) -> None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # it ends with its parent, however that ends
        # A fork has none of the threads that its parent's libraries started and would wait for them for ever.
        torch.set_num_threads(1)
        try:
            found = (share(), None)
        except BaseException:  # the parent raises it
            found = ({}, traceback.format_exc())
        end.send_bytes(pickle.dumps(found))  # tensors by value: `send` hands out memory that ends with this process

    children, ends = [], []
    try:
        for _ in range(processes - 1):
            end, other = context.Pipe(duplex=False)
            children.append(context.Process(target=child, args=(other,), daemon=True))
            children[-1].start()
            other.close()  # now the child's death closes the pipe
            ends.append(end)
        torch.set_num_threads(1)
        found = share()
        for end, process in zip(ends, children, strict=True):
            try:
                theirs, problem = pickle.loads(end.recv_bytes())
            except EOFError:
                process.join()
                raise RuntimeError(f"a process that shared the work ended with exit code {process.exitcode}") from None
            if problem:
                raise RuntimeError(f"in a process that shared the work:\n{problem}")
            found |= theirs
    finally:
        torch.set_num_threads(threads)
        for process in children:
            process.kill()
            process.join()
    return [found[index] for index in range(len(parts))]
