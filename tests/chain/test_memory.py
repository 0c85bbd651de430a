"""The meter of peak memory: it sees what was held, and forgets it on demand."""

import subprocess
import sys

import pytest

SCRIPT = """
from erlib.chain import memory
before = memory.peak_bytes()
held = bytearray(200 << 20)
during = memory.peak_bytes()
del held
memory.reset()
print(during - before, memory.peak_bytes() - before, memory.whole_peak_bytes() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can forget a peak")
def test_a_peak_is_seen_and_forgotten() -> None:
    found = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    grown, left, whole = map(int, found.stdout.split())
    assert grown > 190 << 20
    assert left < 100 << 20
    assert whole > 190 << 20  # a phase took no less for a training in it that was measured on its own
