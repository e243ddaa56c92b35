#!/usr/bin/env bash
# Table 1: ROSMO and MuZero Unplugged on catch, with data of noise 0, 0.1, 0.3 and 0.5.
#   bash benchmark/table1.sh [--total-updates 50000]
# Finished runs are skipped and stopped ones go on. Arguments: those of run.py and of the scripts.
# Cost: 8 runs of 5 seeds, 200,000 updates. Measured on one core of a shared CPU: 5 hours with
# 50,000 updates; extrapolated: 20 hours with 200,000. Disk: 40 MB.
set -euo pipefail
CDPATH="" cd "$(dirname "$0")/.."
python benchmark/run.py table1 "$@"
python benchmark/report.py table1 "$@"
