"""A pretended SLURM: its commands as small scripts, in front on the PATH, that note how they were called."""

import os
from pathlib import Path

import pytest

SRUN = """#!/bin/bash
echo "srun $*" >> "$CALLS"
while [[ $1 == --* ]]; do shift; done
"$@" &
child=$!
trap 'kill -s USR1 "$child"' USR1  # as the real one: passed on to the ranks
trap 'kill -s KILL "$child"' TERM  # as the real one: the step is aborted
while wait "$child"; kill -0 "$child" 2>/dev/null; do :; done
wait "$child"
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >> "$CALLS"
[[ $1 == show ]] && echo n7
[[ $2 == show ]] && echo "NodeName=n7 Arch=x NodeAddr=10.0.0.7 NodeHostName=n7"
exit 0
"""
SBATCH = """#!/bin/bash
echo "sbatch $*" >> "$CALLS"
echo "${ANSWER:-4711;cluster}"
[[ -z "$REFUSAL" ]] || { echo "$REFUSAL" >&2; exit 1; }
"""
SQUEUE = """#!/bin/bash
echo "squeue $*" >> "$CALLS"
printf '%s' "$QUEUE"
[[ -z "$REFUSAL" ]] || { echo "$REFUSAL" >&2; exit 1; }
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which every call of a SLURM command is a line; the commands answer as if all went well."""
    folder, noted = tmp_path / "slurm-bin", tmp_path / "calls.txt"
    folder.mkdir()
    noted.touch()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("sbatch", SBATCH), ("squeue", SQUEUE)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(noted))
    return noted
