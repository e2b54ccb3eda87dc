#!/usr/bin/env bash
# The whole test suite on a fresh machine with Python 3.12.     usage: bash tests/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. tools/environment.sh test

# Exported checkpoints must load with both generations of transformers: the older one lies beside the environment.
export NEO_TEST_TRANSFORMERS_457="$PWD/.venv/transformers-4.57"
if [ ! -d "$NEO_TEST_TRANSFORMERS_457" ]; then
  echo "installing transformers 4.57 beside the environment"
  "$PYTHON" -m pip install --disable-pip-version-check -q --no-deps --target "$NEO_TEST_TRANSFORMERS_457.partial" \
    'transformers==4.57.*' 'huggingface_hub<1' 'tokenizers==0.22.*'
  mv "$NEO_TEST_TRANSFORMERS_457.partial" "$NEO_TEST_TRANSFORMERS_457"
fi

# Tests of a file share what is costly to make, so a file stays with one worker.
OMP_NUM_THREADS=1 exec "$PYTHON" -m pytest -n 2 --dist loadfile "$@"
