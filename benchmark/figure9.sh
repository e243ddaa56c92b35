#!/usr/bin/env bash
# Fig. 9: the learning curves of Table 1's runs.
#   bash benchmark/figure9.sh [--total-updates 50000]
set -euo pipefail
cd "$(dirname "$0")/.."
bash benchmark/table1.sh "$@"
python benchmark/report.py figure9 "$@"
