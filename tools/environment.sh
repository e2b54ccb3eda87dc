# Sourced by run.sh of the quickstart, the demo and the tests: makes `.venv` in the repository once, with the given extra,
# and leaves its Python in $PYTHON.     usage: . tools/environment.sh EXTRA

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.12 python3 "$(pyenv prefix 2>/dev/null)/bin/python" \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12.*/bin/python; do
    if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "Python 3.12 is needed and was not found: install it, or name it, PYTHON=/path/to/python3.12 bash $0" >&2
  return 1
}

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
stamp="$repository/.venv/.installed-$1-$(cksum <"$repository/setup.py" | cut -d' ' -f1)"
if [ ! -f "$stamp" ]; then
  python=$(find_python) || exit 1
  [ -x "$repository/.venv/bin/python" ] || "$python" -m venv "$repository/.venv"
  echo "installing neo_megatron[$1] into .venv (PyTorch is large: a minute or two)"
  "$repository/.venv/bin/python" -m pip install --disable-pip-version-check --progress-bar on -e "$repository[$1]" | grep -v '^Requirement already'
  case $1 in demo | test) "$repository/.venv/bin/python" -m pip install --disable-pip-version-check -q --no-deps 'gradio==6.31.*' ;; esac
  touch "$stamp"
fi
PYTHON="$repository/.venv/bin/python"
