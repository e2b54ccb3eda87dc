#!/usr/bin/env bash
# The whole test suite on a fresh machine with Python 3.12.     usage: bash tests/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. tools/environment.sh test

# Installs into a directory beside the environment, once: what cannot be in it.     usage: beside NAME PACKAGE...
beside() {
  local directory="$PWD/.venv/$1"
  [ ! -d "$directory" ] || return 0
  echo "installing $1 beside the environment"
  "$PYTHON" -m pip install --disable-pip-version-check -q --no-deps --no-compile --target "$directory.partial" "${@:2}"
  mv "$directory.partial" "$directory"
}

# Exported checkpoints must load with both generations of transformers.
beside transformers-4.57 'transformers==4.57.*' 'huggingface_hub<1' 'tokenizers==0.22.*'
export NEO_TEST_TRANSFORMERS_457="$PWD/.venv/transformers-4.57"

# lmms-eval wants an older av than reading videos does; these are it and what it imports that the environment has not.
beside lmms-eval 'lmms-eval==0.7.3' chardet colorama dataproperty datasets dill evaluate loguru lxml \
  mbstrdecoder multiprocess pathvalidate portalocker pyarrow pytablewriter sacrebleu tabledata tabulate \
  tcolorpy tenacity typepy xxhash
export NEO_TEST_LMMS_EVAL="$PWD/.venv/lmms-eval"

# Tests of a file share what is costly to make, so a file stays with one worker.
OMP_NUM_THREADS=1 exec "$PYTHON" -m pytest -n 2 --dist loadfile "$@"
