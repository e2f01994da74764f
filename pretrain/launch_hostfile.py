"""Start a verb on the hosts of a DeepSpeed hostfile, over ssh.

    smalti launch hostfile hostfile=hosts train dalle-12b
    smalti launch hostfile hostfile=hosts exclude=node3 env=GLOO_SOCKET_IFNAME=eth0 train emoji
    smalti launch hostfile hostfile=hosts --dry-run train emoji

Every host needs this folder under the same path (a shared file system), and ssh without a password. DeepSpeed's
launcher starts the processes through pdsh. NCCL_, GLOO_, TORCH_, OMP_ and PYTHON variables go along, others with
`env`; DeepSpeed puts their values on command lines, which every user of these machines can read. When a host is lost,
the job ends in about a minute and says which; Ctrl-C, SIGTERM and SIGUSR1 save first.
"""

import sys

from cluster.command import run_command
from cluster.launch_hosts import HostfileConfig, launch_hosts
from pretrain.launch import PRESETS, LaunchCommand, launched_by

COMMAND = LaunchCommand("launch hostfile", HostfileConfig, PRESETS / "hostfile", launched_by(launch_hosts), __doc__)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND, sys.argv[1:]))
