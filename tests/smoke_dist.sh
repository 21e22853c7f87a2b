#!/usr/bin/env bash
# smoke_dist.sh DIST FOLDER [PYTHON...]: tries the wheel in DIST as somebody who was given nothing else, in a new virtual
# environment under FOLDER for each Python (default: all from 3.11 to 3.14 that are there, pyenv's too): compiles and runs
# the sample of the sdist. An editable install would find files that the wheel has not.
set -euo pipefail
dist=$(realpath "$1") folder=$2
shift 2
mkdir -p "$folder"
folder=$(realpath "$folder")
wheel=$(ls "$dist"/*.whl)
tar -xzf "$dist"/*.tar.gz -C "$folder"
source=$(ls -d "$folder"/linattn-*/)
for part in samples/tiny_hybrid.py tests/conftest.py tests/unit docs/state.md Makefile LICENSE; do
  [ -e "$source/$part" ] || { echo "the sdist has no $part"; exit 1; }
done

pythons=("$@")
if [ ${#pythons[@]} = 0 ]; then
  for minor in 11 12 13 14; do
    for python in "python3.$minor" "${PYENV_ROOT:-$HOME/.pyenv}/versions/3.$minor".*/bin/python3; do
      if "$python" -c "import ensurepip, sys; sys.exit(sys.version_info[1] != $minor)" 2>/dev/null; then
        pythons+=("$python")
        break
      fi
    done
  done
fi

expected=
for python in "${pythons[@]}"; do
  version=$("$python" -c 'import platform; print(platform.python_version())')
  there=$folder/$version
  rm -rf "$there"
  "$python" -m venv "$there"
  cd "$there" # not in the checkout, where Python would find its packages
  export PATH="$there/bin:$PATH"
  pip install --quiet --disable-pip-version-check "$wheel"
  # Without the compiler's packages the command says what to install; that advice is taken as it is.
  said=$(linattn-compile model.onnx 2>&1) && { echo "$version: compiled without a compiler"; exit 1; }
  eval "pip install --quiet --disable-pip-version-check ${said#*pip install }"
  python - <<'END'
import importlib, pkgutil
import linattn
for found in pkgutil.walk_packages(linattn.__path__, "linattn."):
    if not found.name.endswith("__main__"):
        importlib.import_module(found.name)
END
  python "$source/samples/tiny_hybrid.py" model.onnx >/dev/null
  linattn-compile model.onnx --max-context 64 --prefill-blocks 8 --quiet -o model.vmfb
  tokens=$(linattn-run model.vmfb --ids 72,101,108,108,111 --generate 8 2>/dev/null)
  [ "${expected:=$tokens}" = "$tokens" ] && [ "$(wc -w <<<"${tokens//,/ }")" = 8 ] || { echo "$version: tokens $tokens"; exit 1; }
  echo "Python $version: $(linattn-run --version): $tokens"
  cd "$folder" && rm -rf "$there"
done
rm -rf "$source"
