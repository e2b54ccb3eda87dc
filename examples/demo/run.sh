#!/usr/bin/env bash
# A page to talk to a NEO and to see where it looks.     usage: bash examples/demo/run.sh --model DIR [--help for more]
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
. "$here/../../tools/environment.sh" demo
exec "$PYTHON" -m neo_megatron demo "$@"
