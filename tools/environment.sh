# Sourced by run.sh of the quickstart, the demo and the tests: makes an environment of this repository once, with exactly
# the versions of its lock, and leaves its Python in $PYTHON.     usage: . tools/environment.sh NAME
#
# NAME is a lock of tools/locks: quickstart, demo and test share .venv and their versions; lmms-eval has .venv-lmms-eval
# and vllm, which wants another torch, .venv-vllm.
# NEO_VERSIONS=newest or oldest takes the highest or lowest versions that the ranges of setup.py allow today, in
# environments of their own.

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$repository/tools/python.sh"

# Installs exactly what a lock says.     usage: install_lock LOCK [uv arguments]
install_lock() {
  uv pip install --no-deps --require-hashes -r "$@"
}

# usage: make_environment NAME
make_environment() {
  local locks=$repository/tools/locks directory=$repository/.venv resolution stamp
  case $1 in lmms-eval | vllm) directory+=-$1 ;; esac
  case ${NEO_VERSIONS:-locked} in
    locked) ;;
    newest | oldest)
      locks=$repository/.venv-locks-$NEO_VERSIONS
      directory+=-$NEO_VERSIONS
      resolution=highest
      [ "$NEO_VERSIONS" = newest ] || resolution=lowest-direct
      [ -f "$locks/$1.lock" ] || LOCKS=$locks bash "$repository/tools/lock.sh" --upgrade --resolution $resolution
      ;;
    *) echo "NEO_VERSIONS=$NEO_VERSIONS: must be locked, newest or oldest" >&2 && return 2 ;;
  esac
  stamp="$directory/.installed-$1-$(cat "$locks/$1.lock" "$repository/setup.py" | cksum | cut -d' ' -f1)"
  if [ ! -f "$stamp" ]; then
    [ -x "$directory/bin/python" ] || "$(find_python)" -m venv "$directory" || return
    PYTHON="$directory/bin/python"
    echo "installing $(grep -c '^[a-z].*==' "$locks/$1.lock") packages for $1 into ${directory##*/} (PyTorch is large: up to a minute or two)"
    # What has no wheel is built with the setuptools of the lock, so that goes first.
    sed -n '/^setuptools==/,/^ *# via/p' "$locks/$1.lock" >"$directory/setuptools.lock"
    install_lock "$directory/setuptools.lock" -q --python "$PYTHON" || return
    install_lock "$locks/$1.lock" -q --python "$PYTHON" --no-build-isolation --compile-bytecode || return
    uv pip install -q --python "$PYTHON" --no-deps --no-build-isolation -e "$repository" || return
    rm -f "$directory/.installed-$1-"*
    touch "$stamp"
  fi
  PYTHON="$directory/bin/python"
}

make_environment "$1"
