#!/usr/bin/env bash
# Fig. 4(a): ROSMO and MuZero Unplugged on MsPacman with 10% and 1% of the data.
#   bash benchmark/figure4a.sh [--workers 8]
# Finished runs are skipped and stopped ones go on. Arguments: those of run.py and of the scripts.
# Cost: 12 runs of one seed, 200,000 updates. Disk: 1 GB of data, 1.3 GB of runs.
# Extrapolated: about 30 hours of an H200, without evaluations (docs/gpu.md).
set -euo pipefail
CDPATH="" cd "$(dirname "$0")/.."
python benchmark/run.py figure4a "$@"
python benchmark/report.py figure4a "$@"
