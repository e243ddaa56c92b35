#!/usr/bin/env bash
# Fig. 4(d): ROSMO, OneStep and Behavior on MsPacman.
#   bash benchmark/figure4d.sh [--workers 8]
# Finished runs are skipped and stopped ones go on. Arguments: those of run.py and of the scripts.
# Cost: 9 runs of one seed, 200,000 updates (three are Table 8's). Disk: 10 GB of data, 1 of runs.
# Extrapolated: about 16 hours of an H200, without evaluations (docs/gpu.md).
set -euo pipefail
CDPATH="" cd "$(dirname "$0")/.."
python benchmark/run.py figure4d "$@"
python benchmark/report.py figure4d "$@"
