#!/usr/bin/env bash
# Starts a page to chat with a NEO and to see its attention.     usage: bash examples/demo/run.sh --model DIR [--help for more]
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
. "$here/../../tools/environment.sh" demo
exec "$PYTHON" -m neo_megatron demo "$@"
