"""Two machines on one: network namespaces joined by a link whose rate is limited. Needs root on Linux, ip and tc."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from benchmarks.distributed_jobs import Failed, answers, last_json

LINK = "link0"  # the same name at both ends, each in its own namespace
PORT = 29_512
BURST = "256kb"  # what may leave at once; must hold the largest packet that the kernel hands over, 64 kB
# Large tensors are made anew each step; without this the kernel's clearing of their pages would be half of its time.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": 0, "MALLOC_TRIM_THRESHOLD_": 10**11, "MALLOC_TOP_PAD_": 2**26}

SEND = """
import socket, sys, time
there, count = (sys.argv[1], int(sys.argv[2])), int(sys.argv[3])
deadline = time.monotonic() + 10
while True:
    try:
        sock = socket.create_connection(there, timeout=20)
        break
    except ConnectionRefusedError:
        if time.monotonic() > deadline: raise
        time.sleep(0.05)
start = time.monotonic()
sock.sendall(bytes(count))
sock.shutdown(socket.SHUT_WR)
sock.recv(1)
print(8 * count / (time.monotonic() - start))
"""
RECEIVE = """
import socket, sys
server = socket.create_server((sys.argv[1], int(sys.argv[2])))
server.settimeout(20)
sock = server.accept()[0]
while sock.recv(1 << 20): pass
sock.sendall(b"!")
"""


def run(*words: str) -> None:
    """Failed with what the command says."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Failed(f"{words[0]}: {error}") from None
    if done.returncode:
        raise Failed(f"{' '.join(words)}: {done.stderr.strip()}")


@contextmanager
def two_nodes(rate: str) -> Iterator[list[str]]:
    """Names of two namespaces with addresses 10.77.0.1 and 10.77.0.2; gone, with all in them, at the end."""
    nodes = [f"smalti-{os.getpid()}-{number}" for number in (1, 2)]
    try:
        for node in nodes:
            run("ip", "netns", "add", node)
            run("ip", "-n", node, "link", "set", "lo", "up")  # ranks of one node talk over it
        run("ip", "-n", nodes[0], "link", "add", LINK, "type", "veth", "peer", "name", LINK, "netns", nodes[1])
        for number, node in enumerate(nodes, 1):
            run("ip", "-n", node, "addr", "add", f"10.77.0.{number}/24", "dev", LINK)
            run("ip", "-n", node, "link", "set", LINK, "up")
            limit = ("root", "tbf", "rate", rate, "burst", BURST, "latency", "100ms")
            run("tc", "-n", node, "qdisc", "add", "dev", LINK, *limit)
        yield nodes
    finally:
        for node in nodes:  # the link goes with the first of its ends
            subprocess.run(["ip", "netns", "del", node], capture_output=True, timeout=20, check=False)
        time.sleep(0.1)


def inside(node: str, words: Sequence[str], **variables: object) -> list[str]:
    """A command for `answers` that runs in a namespace."""
    return ["ip", "netns", "exec", node, "env", *(f"{key}={value}" for key, value in variables.items()), *words]


def bits_a_second(nodes: Sequence[str], count: int = 40_000_000) -> float:
    """What one plain TCP stream gets through the link."""
    receive = inside(nodes[0], [sys.executable, "-c", RECEIVE, "10.77.0.1", str(PORT + 1)])
    send = inside(nodes[1], [sys.executable, "-c", SEND, "10.77.0.1", str(PORT + 1), str(count)])
    return float(answers([receive, send], 60)[1])


def ranks_on(nodes: Sequence[str], a_node: int, words: Sequence[str], seconds: float) -> Any:
    """What rank 0 prints of a module that runs on `a_node` processes of each namespace."""
    shared = {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": PORT, "GLOO_SOCKET_IFNAME": LINK} | KEEP_MEMORY
    commands = [
        inside(
            node, [sys.executable, "-m", *words], RANK=number * a_node + local, LOCAL_RANK=local,
            WORLD_SIZE=len(nodes) * a_node, LOCAL_WORLD_SIZE=a_node, **shared,
        )
        for number, node in enumerate(nodes)
        for local in range(a_node)
    ]  # fmt: skip
    return last_json(answers(commands, seconds)[0])
