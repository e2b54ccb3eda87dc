# Sourced by environment.sh and lock.sh: the programs that make environments.
UV=0.13.9

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

# Prints what pip is told by its environment or its configuration files.     usage: pip_setting NAME
pip_setting() {
  local variable=PIP_${1^^}
  variable=${variable//-/_}
  echo "${!variable:-$("$repository/.venv-uv/bin/python" -m pip config get "global.$1" 2>/dev/null)}"
}

# Runs uv, which is much faster than pip and keeps the files of a package once for all environments. It does not read
# pip's configuration, so the index and the certificate that pip uses are passed on.     usage: uv ARGUMENT...
uv() {
  local home=$repository/.venv-uv index certificate
  if ! "$home/bin/uv" --version 2>/dev/null | grep -qF "uv $UV"; then
    "$(find_python)" -m venv --clear "$home"
    "$home/bin/python" -m pip install --disable-pip-version-check -q "uv==$UV"
  fi
  index=${UV_DEFAULT_INDEX:-$(pip_setting index-url)}
  certificate=${SSL_CERT_FILE:-$(pip_setting cert)}
  env ${index:+"UV_DEFAULT_INDEX=$index"} ${certificate:+"SSL_CERT_FILE=$certificate"} "$home/bin/uv" "$@"
}
