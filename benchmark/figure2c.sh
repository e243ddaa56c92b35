#!/usr/bin/env bash
# Fig. 2(c): MuZero Unplugged's simulations N and depth of search, on the three tasks.
#   bash benchmark/figure2c.sh [--total-updates 20000]
# Finished runs are skipped and stopped ones go on. Arguments: those of run.py and of the scripts.
# Cost: 36 runs of 5 seeds, 200,000 updates. Extrapolated from runs of five and of two seeds on one
# core of a shared CPU: 36 hours with 20,000 updates, 360 hours with 200,000. Disk: 180 MB.
set -euo pipefail
CDPATH="" cd "$(dirname "$0")/.."
python benchmark/run.py figure2c "$@"
python benchmark/report.py figure2c "$@"
