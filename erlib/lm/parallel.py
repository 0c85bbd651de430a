"""The same work on every core: forked processes of one thread each.

An operation of a small LM is too short to be divided: two threads decode 1.3 times as fast as one, two processes of one
thread 1.8 times. A fork sees the model where it is, without loading or copying it. `each` divides work without
gradients; `together` forks processes that train one model, joined by torch.distributed as under `accelerate launch`.
"""

import ctypes
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, TypeVar

import torch

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
Part = TypeVar("Part")
Result = TypeVar("Result")

_spare = 0  # in a process of `together` while the others wait: the processes that it may share work with


def cores(device: torch.device) -> int:
    """Processes that can share the work of a model on `device`: torch's threads on a CPU under Linux, one elsewhere."""
    return max(_spare, torch.get_num_threads()) if device.type == "cpu" and sys.platform == "linux" else 1


# -- forks --------------------------------------------------------------------------------------------------------


class _Child(NamedTuple):
    process: multiprocessing.Process
    end: Connection  # on which its result comes

    def result(self) -> Any:
        """Wait for what its work gave; RuntimeError with its traceback, or where it was killed."""
        try:
            found, problem = pickle.loads(self.end.recv_bytes())
        except EOFError:
            self.process.join()
            code = self.process.exitcode
            raise RuntimeError(f"a process that shared the work ended with exit code {code}") from None
        if problem:
            raise RuntimeError(f"in a process that shared the work:\n{problem}")
        return found


@contextmanager
def _forked(jobs: Sequence[Callable[[], Any]]) -> Iterator[list[_Child]]:
    """One process of one thread for each job; none is left behind."""
    context = multiprocessing.get_context("fork")

    def run(job: Callable[[], Any], end: Connection) -> None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # it ends with its parent, however that ends
        # A fork has none of the threads that its parent's libraries started and would wait for them for ever.
        torch.set_num_threads(1)
        try:
            found = (job(), None)
        except BaseException:  # the parent raises it
            found = (None, traceback.format_exc())
        end.send_bytes(pickle.dumps(found))  # tensors by value: `send` hands out memory that ends with this process

    children: list[_Child] = []
    try:
        for job in jobs:
            end, other = context.Pipe(duplex=False)
            children.append(_Child(context.Process(target=run, args=(job, other)), end))
            children[-1].process.start()
            other.close()  # now the child's death closes the pipe
        yield children
    finally:
        for child in children:
            child.process.kill()
            child.process.join()
            child.end.close()


# -- without gradients --------------------------------------------------------------------------------------------


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
    taken = multiprocessing.get_context("fork").Value("i", 0)

    def share() -> dict[int, Result]:
        done: dict[int, Result] = {}
        while True:
            with taken:
                index, taken.value = taken.value, taken.value + 1
            if index >= len(parts):
                return done
            done[index] = work(parts[index])

    try:
        with _forked([share] * (processes - 1)) as children:
            torch.set_num_threads(1)
            found = share()
            for child in children:
                found |= child.result()
    finally:
        torch.set_num_threads(threads)
    return [found[index] for index in range(len(parts))]


# -- training -----------------------------------------------------------------------------------------------------


def together(work: Callable[[], Result], *, device: torch.device) -> Result:
    """`work`, called in as many processes as there are `cores` at once; gives what the first of them returned.

    Each is a process of torch.distributed (gloo) with a rank, as under `accelerate launch`: accelerate finds the others
    by itself. What `work` changes in memory is lost. With one core, on a GPU, or where this process is already one of
    several, `work` is called here. Raises RuntimeError with the traceback of the process that failed first. The caller
    must not have taken gradients itself: autograd does not survive a fork.
    """
    processes = cores(device)
    if processes < 2 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return work()
    port = _free_port()

    def of_rank(rank: int) -> Callable[[], Result | None]:
        def run() -> Result | None:
            _join(rank, processes, port)
            found = work()
            return found if rank == 0 else None

        return run

    with _forked([of_rank(rank) for rank in range(processes)]) as children:
        waiting = {child.end: child for child in children}
        found = {}
        while waiting:  # whoever fails first says why; the others only miss it
            for end in wait(list(waiting)):
                child = waiting.pop(end)
                found[child.process.pid] = child.result()
        return found[children[0].process.pid]


@contextmanager
def others_wait() -> Iterator[None]:
    """In a process of `together`: the others have nothing to do meanwhile, so `each` may use their cores."""
    global _spare
    before = _spare
    _spare = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    try:
        yield
    finally:
        _spare = before


def _join(rank: int, processes: int, port: int) -> None:
    """Tell this process its place among those that train; accelerate reads it from the environment."""
    from accelerate.state import AcceleratorState, GradientState

    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ["ACCELERATE_USE_CPU"] = "true"
    AcceleratorState._reset_state(reset_partial_state=True)  # what the parent has found out about itself
    GradientState._reset_state()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
