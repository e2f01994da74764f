"""Start a verb in several processes on this machine.

    smalti launch local processes=2 train emoji n_steps=100
    smalti launch local --dry-run train emoji

It ends with the exit code of its processes (75: stopped and saved, start it again), and passes Ctrl-C, SIGTERM and
SIGUSR1 on to them; a closed terminal counts as SIGTERM, unless under nohup. What was started, and with which code, is
written into the run folder: `launch/001` and so on.
"""

import sys

from cluster.command import run_command
from cluster.launch_local import LocalConfig, launch_local
from pretrain.launch import PRESETS, LaunchCommand, launched_by

COMMAND = LaunchCommand("launch local", LocalConfig, PRESETS / "local", launched_by(launch_local), __doc__)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND, sys.argv[1:]))
