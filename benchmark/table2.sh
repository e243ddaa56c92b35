#!/usr/bin/env bash
# Table 2: BC, CRR, CQL, MuZero Unplugged and ROSMO on the three tasks.
#   bash benchmark/table2.sh [--total-updates 50000]
# Finished runs are skipped and stopped ones go on. Arguments: those of run.py and of the scripts.
# Cost: 15 runs of 5 seeds, 200,000 updates. On one core of a shared CPU 3.1 hours with 50,000
# updates and 15 with 200,000. Disk: 60 MB.
set -euo pipefail
CDPATH="" cd "$(dirname "$0")/.."
python benchmark/run.py table2 "$@"
python benchmark/report.py table2 "$@"
