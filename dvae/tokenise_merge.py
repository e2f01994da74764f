"""Ends what tasks of `smalti tokenise` began: the one manifest over all their shards.

    smalti tokenise merge images=data/images dvae=runs/dvae out=data/tokens tasks=8

Takes the same words as the tasks. Refuses while a shard is missing, and names it. Codes nothing
itself; may be killed and run again.
"""

import sys
from pathlib import Path

from cluster.command import Command, run_command
from dvae.tokenise import TokeniseConfig, merge

COMMAND = Command("tokenise merge", TokeniseConfig, Path(__file__).parent / "configs" / "tokenise", merge, __doc__)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND, sys.argv[1:]))
