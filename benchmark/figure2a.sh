#!/usr/bin/env bash
# Fig. 2(a): shares of the data, on the three tasks; ROSMO and MuZero Unplugged.
#   bash benchmark/figure2a.sh [--total-updates 50000 --mix]
# Finished runs are skipped and stopped ones go on. Arguments: those of run.py and of the scripts.
# Cost: 24 runs of 5 seeds, 200,000 updates. Measured on one core of a shared CPU: 14 hours with
# 50,000 updates; extrapolated: 56 hours with 200,000. Disk: 120 MB.
set -euo pipefail
CDPATH="" cd "$(dirname "$0")/.."
python benchmark/run.py figure2a "$@"
python benchmark/report.py figure2a "$@"
