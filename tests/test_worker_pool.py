"""The pool of workers: order, reports, exceptions, and workers that die."""

import contextlib
import os
import signal
import time
from multiprocessing import active_children

import pytest

from neo_megatron.worker_pool import WorkerDied, WorkerPool, in_order


def prepare(delays, report):
    """Sleeps the delay of an item, which is reported; a negative one raises, and None kills the worker."""

    def work(item):
        delay = delays[item]
        if delay is None:
            os.kill(os.getpid(), signal.SIGKILL)
        if delay < 0:
            raise ValueError(f"item {item}")
        time.sleep(delay)
        report(item, os.getpid())
        return item * item

    return work


def run(delays, workers=2, reported=None):
    with contextlib.closing(
        WorkerPool(workers, prepare, delays, lambda *values: reported is None or reported.append(values))
    ) as pool:
        yield from in_order(pool, range(len(delays)))


def test_results_are_in_order_and_reports_come_from_all_workers():
    reported = []
    assert list(run([0.5, *[0.02] * 20], reported=reported)) == [number**2 for number in range(21)]
    assert sorted(item for item, _ in reported) == list(range(21))
    assert len({process for _, process in reported}) == 2 and os.getpid() not in dict(map(reversed, reported))
    assert not active_children()


def test_the_first_exception_in_order_is_raised_with_the_traceback_of_the_worker():
    results = run([0.5, -1, -1])
    assert next(results) == 0
    with pytest.raises(ValueError, match="^item 1") as raised:
        next(results)
    assert "in work" in raised.value.__notes__[0]
    assert not active_children()


def test_a_worker_that_dies_is_reported_with_its_item():
    with pytest.raises(WorkerDied, match="^by SIGKILL$") as raised:
        list(run([0, 0, None, 0], workers=1))
    assert raised.value.item == 2
    assert not active_children()


def test_closing_kills_workers_in_the_middle_of_an_item():
    results = run([0, 600, 600])
    assert next(results) == 0
    started = time.monotonic()
    results.close()
    assert time.monotonic() - started < 60 and not active_children()
