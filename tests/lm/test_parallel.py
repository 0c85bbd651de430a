"""Work divided among forked processes: the same results, whoever does it, and no process left behind."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest
import torch

from erlib.lm import models, parallel

pytestmark = pytest.mark.skipif(os.uname().sysname != "Linux", reason="work is divided under Linux only")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_results_keep_the_order_of_the_parts_and_come_from_several_processes() -> None:
    barrier = multiprocessing.get_context("fork").Barrier(3)

    def square(part: int) -> tuple[int, int, int, torch.Tensor]:
        if part < 3:
            barrier.wait(timeout=60)  # three processes are at work at once, or this breaks
        return part**2, os.getpid(), torch.get_num_threads(), torch.full((1000,), float(part))

    found = parallel.each(square, range(20), device=CPU)
    assert [one[0] for one in found] == [part**2 for part in range(20)]
    assert os.getpid() in {one[1] for one in found}
    assert len({one[1] for one in found}) == 3
    assert {one[2] for one in found} == {1}
    assert all(torch.equal(one[3], torch.full((1000,), float(part))) for part, one in enumerate(found))
    assert torch.get_num_threads() == 3
    assert not multiprocessing.active_children()


def test_a_single_part_stays_here_with_all_threads() -> None:
    assert parallel.each(lambda _: (os.getpid(), torch.get_num_threads()), [0], device=CPU) == [(os.getpid(), 3)]


def test_work_for_another_device_is_not_divided() -> None:
    assert set(parallel.each(lambda _: os.getpid(), range(5), device=torch.device("meta"))) == {os.getpid()}


def test_a_part_that_fails_elsewhere_is_told_with_its_traceback() -> None:
    here, barrier = os.getpid(), multiprocessing.get_context("fork").Barrier(3)

    def fail(_: int) -> None:
        barrier.wait(timeout=60)
        if os.getpid() != here:
            raise KeyError("only in a child")

    with pytest.raises(RuntimeError, match="only in a child"):
        parallel.each(fail, range(3), device=CPU)
    assert not multiprocessing.active_children()


def test_a_part_that_fails_here_ends_the_others() -> None:
    here, barrier = os.getpid(), multiprocessing.get_context("fork").Barrier(3)

    def fail(_: int) -> None:
        barrier.wait(timeout=60)
        if os.getpid() == here:
            raise KeyError("here")
        signal.pause()

    with pytest.raises(KeyError, match="here"):
        parallel.each(fail, range(3), device=CPU)
    assert not multiprocessing.active_children()
    assert torch.get_num_threads() == 3


def test_a_killed_process_is_an_error_and_not_a_wait_for_ever() -> None:
    here, barrier = os.getpid(), multiprocessing.get_context("fork").Barrier(3)

    def die(_: int) -> None:
        barrier.wait(timeout=60)
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RuntimeError, match="exit code -9"):
        parallel.each(die, range(3), device=CPU)


def test_no_process_outlives_a_killed_parent() -> None:
    script = """
import os, time, torch
from erlib.lm import parallel
torch.set_num_threads(2)
# One write each: `print` writes the end of the line by itself, and the other process may come between.
parallel.each(lambda _: (os.write(1, b"%d\\n" % os.getpid()), time.sleep(600)), range(2), device=torch.device("cpu"))
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    pids = {int(parent.stdout.readline()) for _ in range(2)}
    parent.kill()
    parent.wait()
    until = time.monotonic() + 30
    while any(map(_alive, pids)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(_alive, pids))


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_samples_do_not_depend_on_how_many_processes_drew_them() -> None:
    model, tokenizer = models.load("embedded")
    prompts = [f"Document:\nKorvex hires {number} people.\nReport:\n" for number in range(12)]
    settings = {"max_new_tokens": 24, "batch_size": 4, "temperature": 0.8, "seed": 3, "stop": ()}
    torch.set_num_threads(1)
    alone = models.generate(model, tokenizer, prompts, **settings)
    torch.set_num_threads(3)
    shared = models.generate(model, tokenizer, prompts, **settings)
    assert [one.ids for one in shared] == [one.ids for one in alone]
    logprobs = [torch.tensor([value for one in found for value in one.logprobs]) for found in (shared, alone)]
    torch.testing.assert_close(*logprobs, atol=1e-4, rtol=0)
    read = [models.completion_logprobs(model, tokenizer, prompts, [one.ids for one in alone], batch_size=4)]
    torch.set_num_threads(1)
    read.append(models.completion_logprobs(model, tokenizer, prompts, [one.ids for one in alone], batch_size=4))
    torch.testing.assert_close(*map(torch.cat, read), atol=1e-5, rtol=0)
