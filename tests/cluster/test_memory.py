"""Freed memory is kept for the next allocation, where a process asks for it."""

import resource
import subprocess
import sys

import pytest

MEGABYTES = 200
PAGES = MEGABYTES * 2**20 // resource.getpagesize()
JOB = f"""
import resource, torch
from cluster.memory import keep_freed_memory
from cluster.process import Place
if "{{keeps}}":
    keep_freed_memory(Place(0, 1, torch.device("{{keeps}}")))
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def fill():
    torch.full(({MEGABYTES} * 2**18,), 1.0)
fill()
before = faults()
fill()
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
@pytest.mark.parametrize(("device", "kept"), [("", False), ("cuda", False), ("cpu", True)])
def test_pages_of_a_freed_tensor_are_used_again(device: str, kept: bool) -> None:
    """Told by the page faults of a second tensor of the same size. (The kernel may give many pages a fault.)"""
    words = [sys.executable, "-c", JOB.format(keeps=device)]
    faults = int(subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout)
    assert faults < 100 if kept else faults > PAGES / 512
