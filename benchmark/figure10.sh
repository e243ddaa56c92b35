#!/usr/bin/env bash
# Fig. 10: the learning curves of Fig. 2(b)'s runs.
#   bash benchmark/figure10.sh [--total-updates 50000]
set -euo pipefail
cd "$(dirname "$0")/.."
bash benchmark/figure2b.sh "$@"
python benchmark/report.py figure10 "$@"
