#!/usr/bin/env bash
# Fig. 4(c): ROSMO and MuZero Unplugged on MsPacman, the model unrolled for 5 steps or for one.
#   bash benchmark/figure4c.sh [--workers 8]
# Finished runs are skipped and stopped ones go on. Arguments: those of run.py and of the scripts.
# Cost: 12 runs of one seed, 200,000 updates (six are Table 8's). Disk: 10 GB of data, 1.3 of runs.
# Extrapolated: at most 30 hours of an H200, without evaluations (docs/gpu.md).
set -euo pipefail
CDPATH="" cd "$(dirname "$0")/.."
python benchmark/run.py figure4c "$@"
python benchmark/report.py figure4c "$@"
