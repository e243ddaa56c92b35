#!/usr/bin/env bash
# Fig. 4(b): ROSMO, MuZero Unplugged and MZU-Q on MsPacman with N = 4.
#   bash benchmark/figure4b.sh [--workers 8]
# Finished runs are skipped and stopped ones go on. Arguments: those of run.py and of the scripts.
# Cost: 9 runs of one seed, 200,000 updates. Disk: 10 GB of data, 1 GB of runs.
# Extrapolated: at most 25 hours of an H200, without evaluations (docs/gpu.md).
set -euo pipefail
CDPATH="" cd "$(dirname "$0")/.."
python benchmark/run.py figure4b "$@"
python benchmark/report.py figure4b "$@"
