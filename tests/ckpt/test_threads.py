# SPDX-License-Identifier: Apache-2.0
"""A thread begins to run, or it is known that it does not."""

import subprocess
import sys
import threading
from datetime import timedelta

import pytest
from refound.ckpt import threads
from refound.ckpt.threads import NoThreadError, start_thread

# In a process of its own: what it gets no memory for is not this one's business.
STARVED = """
import resource, signal, sys, threading
from datetime import timedelta
from pathlib import Path
from refound.ckpt.threads import NoThreadError, start_thread

ran = []
size_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size_bytes, resource.RLIM_INFINITY))
try:
    start_thread(ran.append, "too early")
    sys.exit("a thread was started without memory for its stack")
except NoThreadError as error:
    print(error)

def give(*_):
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    given.append(True)

given = []
signal.signal(signal.SIGALRM, give)
signal.setitimer(signal.ITIMER_REAL, 0.2)
done = threading.Event()
start_thread(done.set, patience=timedelta(seconds=60))
assert given and done.wait(60) and not ran
"""


def test_the_target_runs_with_its_arguments_in_a_daemon_thread():
    seen, done = [], threading.Event()

    def target(*arguments: int) -> None:
        seen.extend(arguments)
        done.set()

    start_thread(target, 1, 2)
    assert done.wait(60) and seen == [1, 2]


def test_without_memory_it_says_so_and_with_patience_it_waits_for_some():
    ended = subprocess.run([sys.executable, "-c", STARVED], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "no memory for another thread" in ended.stdout


def test_a_thread_that_does_not_begin_in_time_never_will(monkeypatch: pytest.MonkeyPatch):
    late = []
    monkeypatch.setattr(threads._thread, "start_new_thread", lambda run, _: late.append(run))
    monkeypatch.setattr(threads, "_BEGIN_WITHIN", timedelta(milliseconds=1))
    seen = []
    with pytest.raises(NoThreadError):
        start_thread(seen.append, "too late")
    for run in late:
        run()
    assert late and not seen
