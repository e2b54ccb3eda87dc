# Sourced by environment.sh and lock.sh.

# Prints the path of a Python 3.12.
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
