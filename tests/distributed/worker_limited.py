"""``megatron_tgdpo.train`` with limits of open files. Arguments: JSON of [soft, hard] by rank, then training's.

Prints the soft limit that a run ends with.
"""

import json
import os
import resource
import sys

from megatron_tgdpo.train import main

if __name__ == "__main__":
    limits = json.loads(sys.argv[1]).get(os.environ["RANK"])
    if limits is not None:
        _, highest = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limits[0], limits[1] or highest))
    try:
        main(sys.argv[2:])
    finally:
        print(resource.getrlimit(resource.RLIMIT_NOFILE)[0], flush=True)
