#!/usr/bin/env bash
# The open values of CRR and CQL, compared on a small local dataset of Breakout.
#   bash benchmark/sweep_baselines_atari.sh
# Finished runs are skipped and stopped ones go on. Arguments: those of run.py and of the scripts.
# Cost: 7 runs of one seed, 5,000 updates, two of them atari_small's; 1.1 to 1.7 hours each on one core.
# Disk: 30 MB of data, 100 MB of runs.
set -euo pipefail
CDPATH="" cd "$(dirname "$0")/.."
source benchmark/small_data.sh sweep_crr_atari sweep_crr_weight_atari sweep_cql_atari "$@"
python benchmark/run.py sweep_crr_atari sweep_crr_weight_atari sweep_cql_atari "$@"
python benchmark/report.py sweep_crr_atari sweep_crr_weight_atari sweep_cql_atari "$@"
