#!/usr/bin/env bash
# Fig. 6: the learning curves of Table 8's runs, game by game.
#   bash benchmark/figure6.sh [--workers 8]
# Finished runs are skipped and stopped ones go on. Arguments: those of run.py and of the scripts.
# Cost: that of Table 8, none when its runs are finished.
set -euo pipefail
CDPATH="" cd "$(dirname "$0")/.."
python benchmark/run.py figure6 "$@"
python benchmark/report.py figure6 "$@"
