#!/usr/bin/env bash
# Fig. 8: ROSMO and OneStep on 12 Atari games with 1% of the data.
#   bash benchmark/figure8.sh [--env-ids Pong Breakout] [--workers 8]
# Finished runs are skipped and stopped ones go on. Arguments: those of run.py and of the scripts.
# Cost: 72 runs of one seed, 200,000 updates. Disk: 1.5 GB of data, 8 GB of runs.
# Extrapolated: about 125 hours of an H200, without evaluations (docs/gpu.md).
set -euo pipefail
CDPATH="" cd "$(dirname "$0")/.."
python benchmark/run.py figure8 "$@"
python benchmark/report.py figure8 "$@"
