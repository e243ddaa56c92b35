#!/usr/bin/env bash
# Fig. 2(b): widths of the dynamics function at 10% of the data, on the three tasks.
#   bash benchmark/figure2b.sh [--total-updates 50000 --mix]
# Finished runs are skipped and stopped ones go on. Arguments: those of run.py and of the scripts.
# Cost: 30 runs of 5 seeds, 200,000 updates. Measured on one core of a shared CPU: 26 hours with
# 50,000 updates; extrapolated: 106 hours with 200,000. Disk: 150 MB.
set -euo pipefail
CDPATH="" cd "$(dirname "$0")/.."
python benchmark/run.py figure2b "$@"
python benchmark/report.py figure2b "$@"
