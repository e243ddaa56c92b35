#!/usr/bin/env bash
# Fig. 9: the learning curves of Table 1's runs.
#   bash benchmark/figure9.sh [--total-updates 50000]
# Finished runs are skipped and stopped ones go on. Arguments: those of run.py and of the scripts.
# Cost: that of Table 1, none when its runs are finished.
set -euo pipefail
CDPATH="" cd "$(dirname "$0")/.."
python benchmark/run.py figure9 "$@"
python benchmark/report.py figure9 "$@"
