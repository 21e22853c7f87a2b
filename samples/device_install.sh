#!/usr/bin/env bash
# A device install without the compiler: builds the wheel, installs it into an environment of its own with numpy and
# IREE's runtime and nothing else, and runs a module there.
#
#     samples/device_install.sh MODEL.vmfb [FOLDER] [ID,ID,...]
#
# FOLDER (default: build/device) plays the device; what lies in it afterwards is all that a device needs.
set -euo pipefail
if [ $# -lt 1 ] || [ "$1" = --help ]; then
  sed -n '2,7s/^# \{0,1\}//p' "$0"
  exit 0
fi
module=$(realpath "$1")
folder=${2:-build/device}
ids=${3:-72,101,108,108,111}
mkdir -p "$folder"
rm -rf "$folder/wheels" # of another version
python3 -m pip wheel --quiet --no-deps --wheel-dir "$folder/wheels" "$(dirname "$0")/.."
cp "$module" "$folder/"
cd "$folder"
python3 -m venv env
env/bin/python -m pip install --quiet wheels/linattn-*.whl
env/bin/python -c 'import importlib.util as u; assert not (u.find_spec("onnx") or u.find_spec("iree.compiler"))'
rm -rf env/lib/python3*/site-packages/{pip,setuptools,pkg_resources}*  # only installing needs them
du -sm env/lib/python3*/site-packages | sed "s/\t.*/ MB of packages/"
env/bin/linattn-run "$(basename "$module")" --verify --ids "$ids" --generate 16
