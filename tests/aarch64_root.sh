#!/usr/bin/env bash
# aarch64_root.sh FOLDER: an AArch64 Python of this Debian, with what linattn.runtime needs, to run under qemu-aarch64.
# Nothing of it is installed: packages are unpacked into FOLDER/root, wheels into FOLDER/site.
set -euo pipefail
folder=$(mkdir -p "$1" && cd "$1" && pwd)
python=${PYTHON:-python3}
rm -rf "$folder/root" "$folder/site" "$folder/apt"
mkdir -p "$folder/root" "$folder/apt/lists/partial" "$folder/apt/archives/partial"
touch "$folder/apt/status"
apt() {
  apt-get -qq -y -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Sandbox::User=root \
    -o Dir::State::lists="$folder/apt/lists" -o Dir::State::status="$folder/apt/status" \
    -o Dir::Cache="$folder/apt" -o Dir::Cache::archives="$folder/apt/archives" "$@"
}
apt update
apt --no-install-recommends --download-only install python3-minimal libpython3-stdlib libstdc++6 >/dev/null
for package in "$folder"/apt/archives/*.deb; do dpkg-deb -x "$package" "$folder/root"; done
rm -rf "$folder/apt"
version=$(basename "$(readlink "$folder/root/usr/bin/python3")")
iree=$("$python" -c 'from importlib.metadata import version; print(version("iree-base-runtime"))')
platforms=(); for n in 17 26 27 28; do platforms+=(--platform "manylinux_2_${n}_aarch64"); done
"$python" -m pip install --quiet --disable-pip-version-check --target "$folder/site" --only-binary=:all: \
  --python-version "${version#python}" "${platforms[@]}" "iree-base-runtime==$iree"
