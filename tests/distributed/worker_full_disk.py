"""``megatron_tgdpo.train`` whose metrics the disk does not take, from a step on: it takes the beginning of a line.

Arguments: the step, and a pattern of the files, then those of training.
"""

import resource
import sys
from pathlib import Path

from megatron_tgdpo.output import metrics_log
from megatron_tgdpo.output.json_lines import MetricsFile
from megatron_tgdpo.output.logger import LoggedStep
from megatron_tgdpo.train import main


def inject(step: int, pattern: str) -> None:
    write = metrics_log._Files.write

    def limited(files: metrics_log._Files, wanted: LoggedStep) -> None:
        if wanted.number < step:
            write(files, wanted)
            return
        (metrics,) = [each for each in files._loggers if isinstance(each, MetricsFile)]
        directory = Path(metrics._lines.name).parent
        newest = max((file.stat() for file in directory.glob(pattern)), key=lambda stat: stat.st_mtime_ns)
        resource.setrlimit(resource.RLIMIT_FSIZE, (newest.st_size + 20, resource.RLIM_INFINITY))
        try:
            write(files, wanted)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    metrics_log._Files.write = limited  # type: ignore[method-assign]


if __name__ == "__main__":
    inject(int(sys.argv[1]), sys.argv[2])
    main(sys.argv[3:])
