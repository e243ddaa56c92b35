#!/usr/bin/env bash
# The open values of CRR and CQL, compared on catch.
#   bash benchmark/sweep_baselines.sh
# Finished runs are skipped and stopped ones go on. Arguments: those of run.py and of the scripts.
# Cost: 17 runs of 3 seeds, 20,000 updates; 20 minutes measured on one core of a shared CPU.
# Disk: 20 MB.
set -euo pipefail
CDPATH="" cd "$(dirname "$0")/.."
python benchmark/run.py sweep_crr sweep_crr_weight sweep_cql "$@"
python benchmark/report.py sweep_crr sweep_crr_weight sweep_cql "$@"
