#!/usr/bin/env bash
# Fig. 10: the learning curves of Fig. 2(b)'s runs.
#   bash benchmark/figure10.sh [--total-updates 50000 --mix]
# Finished runs are skipped and stopped ones go on. Arguments: those of run.py and of the scripts.
# Cost: that of Fig. 2(b), none when its runs are finished.
set -euo pipefail
CDPATH="" cd "$(dirname "$0")/.."
python benchmark/run.py figure10 "$@"
python benchmark/report.py figure10 "$@"
