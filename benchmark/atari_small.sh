#!/usr/bin/env bash
# The five methods on a small local dataset of Breakout, three seeds, sized for CPU cores.
#   bash benchmark/atari_small.sh
# Finished runs are skipped and stopped ones go on. Arguments: those of run.py and of the scripts.
# Cost: 15 runs of 5,000 updates; 4 minutes of data, then about 14 hours on one core.
# Disk: 30 MB of data, 200 MB of runs.
set -euo pipefail
CDPATH="" cd "$(dirname "$0")/.."
source benchmark/small_data.sh atari_small "$@"
python benchmark/run.py atari_small "$@"
python benchmark/report.py atari_small "$@"
