"""Snakemake's command as it is, but that its Slurm plugin asks for the jobs' states every second.

By itself it asks the more seldom the longer no job ends, in steps of ten seconds, and tests would wait for that.
"""

from __future__ import annotations

import sys

from snakemake.cli import main
from snakemake_executor_plugin_slurm import Executor

if __name__ == "__main__":
    Executor.next_seconds_between_status_checks = property(lambda self: 1.0, lambda self, seconds: None)
    main(sys.argv[1:])
