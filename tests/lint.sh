#!/usr/bin/env bash
# Checks that read the code without running it, in under a minute on two cores.
#
#   bash tests/lint.sh [ruff | format | codespell | types | words]...      all of them by default
#
# Uses the environment of the tests and makes it if needed; LINT_PYTHON names another Python that has the tools.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

WORDS=(
  CHANGELOG.md CITATION.cff CONTRIBUTING.md SECURITY.md .github .pre-commit-config.yaml docker docs/containers.md
  README.md docs mkdocs.yml pyproject.toml setup.py tests/lint.sh neo_megatron tools examples
  tests/{benchmarks,checkpoint,cli,data,demo,gpu,hf,inference,inspection,lmms_eval_plugin,megatron_compat,model,parity}
  tests/{distributed,follow,planning,run,storage,support,tools,validation} tests/conftest.py tests/test_[!h]*.py # test_habits.py quotes such words
)
TYPES=(neo_megatron tests/check_words.py tests/support/markers.py)

if [ -z "${LINT_PYTHON:-}" ]; then
  . tools/environment.sh test || exit
  LINT_PYTHON=$PYTHON
fi

check() {
  case $1 in
    ruff) "$LINT_PYTHON" -m ruff check --quiet ;;
    format) "$LINT_PYTHON" -m ruff format --check --quiet ;;
    codespell) git ls-files -z --cached --others --exclude-standard | xargs -0 "$LINT_PYTHON" -m codespell_lib ;;
    types) "$LINT_PYTHON" -m mypy --no-error-summary "${TYPES[@]}" ;;
    words) "$LINT_PYTHON" tests/check_words.py "${WORDS[@]}" ;;
    *) echo "lint.sh: $1 is not a check; choose from ruff, format, codespell, types and words" >&2 && return 2 ;;
  esac
}

[ $# -gt 0 ] || set -- ruff format codespell types words
failed=()
for name; do
  check "$name" || failed+=("$name")
done
[ ${#failed[@]} -eq 0 ] || { echo "lint.sh: ${failed[*]} failed; see above" >&2 && exit 1; }
