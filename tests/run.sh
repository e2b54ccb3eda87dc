#!/usr/bin/env bash
# The whole test suite on a fresh Linux machine with Python 3.12.     usage: bash tests/run.sh [--newest | --oldest] [pytest arguments]
#
# --newest and --oldest run it with the highest and lowest versions that the ranges in setup.py allow, instead of the
# locked ones; docs/compatibility.md has the results.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case ${1:-} in --newest | --oldest) export NEO_VERSIONS=${1#--} && shift ;; esac

# lmms-eval and vLLM want other versions, so they have environments of their own.
. tools/environment.sh lmms-eval
NEO_TEST_LMMS_EVAL=$PYTHON
. tools/environment.sh vllm
NEO_TEST_VLLM=$PYTHON
. tools/environment.sh test
export NEO_TEST_LMMS_EVAL NEO_TEST_VLLM

# Exported checkpoints must load with every generation of transformers: directories in front of the environment.
for version in 4.57 5.23; do
  overlay=$(dirname "$(dirname "$PYTHON")")/transformers-$version
  if [ ! -d "$overlay" ]; then
    echo "installing transformers $version into ${overlay##*/}"
    install_lock "tools/locks/transformers-$version.lock" -q --python "$PYTHON" --compile-bytecode --target "$overlay.partial"
    mv "$overlay.partial" "$overlay"
  fi
  export "NEO_TEST_TRANSFORMERS_${version/./}=$overlay"
done

# Not with other versions: what a checker finds differs from version to version.
[ -n "${NEO_VERSIONS:-}" ] || LINT_PYTHON=$PYTHON bash tests/lint.sh

# Tests of a file share what is costly to make, so a file stays with one worker.
OMP_NUM_THREADS=1 exec "$PYTHON" -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"
