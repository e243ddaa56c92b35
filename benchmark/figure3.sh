#!/usr/bin/env bash
# Fig. 3: the IQM of Table 8's runs over all games, against updates and against hours.
#   bash benchmark/figure3.sh [--workers 8]
# Finished runs are skipped and stopped ones go on. Arguments: those of run.py and of the scripts.
# Cost: that of Table 8, none when its runs are finished.
set -euo pipefail
CDPATH="" cd "$(dirname "$0")/.."
python benchmark/run.py figure3 "$@"
python benchmark/report.py figure3 "$@"
