#!/usr/bin/env bash
# Generates with a compiled model without linattn's runtime: IREE's own iree-run-module calls the functions, .npy files
# carry the states from call to call by hand. Needs iree-base-runtime's tools, python3 and numpy (to write and read .npy).
#
#     samples/without_linattn.sh MODEL.onnx [OUT] [ID,ID,...]    # OUT: folder for all files; a prompt of 8 token ids
#
# Prints the 8 tokens that follow the prompt. What the functions take and give is in the report that linattn-compile
# writes ("abi"); runtime/README.md describes it.
set -euo pipefail
if [ "${1:-}" = --help ]; then
  sed -n '2,8s/^# \{0,1\}//p' "$0"
  exit 0
fi
model=${1:?usage: $0 MODEL.onnx [OUT] [ID,ID,...]}
out=${2:-build/without_linattn}
prompt=${3:-72,101,108,108,111,33,10,72}
mkdir -p "$out"
if [ ! -e "$out/model.vmfb" ]; then
  linattn-compile "$model" --target cpu --plain-abi --max-context 64 --prefill-blocks 8 --quiet \
    -o "$out/model.vmfb" --report "$out/report.json"
fi

# Writes in.N.npy for every argument of a function that is not a state, state.npy for those that are, before the first call.
write_inputs() { # FUNCTION POSITION ID,ID,...
  python3 - "$out" "$@" <<'PYTHON'
import json, sys
from pathlib import Path
import numpy as np

folder, function, position, ids = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), [int(i) for i in sys.argv[4].split(",")]
numpy_names = {"i64": "int64", "i32": "int32", "f32": "float32", "f16": "float16", "i1": "bool"}
flags, first = [], not (folder / "state.npy").exists()
states = open(folder / "state.npy", "wb") if first else None
for number, value in enumerate(json.load(open(folder / "report.json"))["abi"][function]["arguments"]):
    *sizes, element = value["type"].split("x")
    shape = [int(size) for size in sizes]
    array = np.zeros(shape, numpy_names[element])
    if value["role"] == "tokens":
        array[...] = ids
    elif value["role"] == "position_ids":
        array[...] = position + np.arange(len(ids))
    elif value["role"] == "attention_mask" and shape[-1] != len(ids):  # columns of the cache, then the new tokens
        array[:, :position] = array[:, -len(ids) :] = 1
    elif value["role"] == "attention_mask":
        array[...] = 1
    elif value["role"] == "position":
        flags.append(f"--input={position}")
        continue
    elif value["role"] == "state":
        if states:
            np.save(states, array)
        continue
    np.save(folder / f"in.{number}.npy", array)
    flags.append(f"--input=@{folder}/in.{number}.npy")
    after_inputs = len(flags)
print(*flags[:after_inputs], f"--input=*{folder}/state.npy", *flags[after_inputs:])
PYTHON
}

# One --output for each result: logits.npy, and the states one after another into next.npy.
output_flags() { # FUNCTION
  python3 - "$out" "$1" <<'PYTHON'
import json, sys

folder, kinds = sys.argv[1], []
for value in json.load(open(f"{folder}/report.json"))["abi"][sys.argv[2]]["results"]:
    kinds.append(value["role"])
    is_first = kinds.count("state") == 1
    file = "logits" if value["role"] == "output" else "next"
    print(f"--output={'@' if file == 'logits' or is_first else '+'}{folder}/{file}.npy")
PYTHON
}

rm -f "$out"/state.npy
position=0 ids=$prompt tokens=()
while [ ${#tokens[@]} -lt 8 ]; do
  commas=${ids//[^,]/}
  count=$((${#commas} + 1))
  function=$([ "$count" = 1 ] && echo decode || echo "prefill_$count")
  # shellcheck disable=SC2046  # one flag a word
  iree-run-module --module="$out/model.vmfb" --device=local-task --function="$function" \
    $(write_inputs "$function" "$position" "$ids") $(output_flags "$function") >"$out/log.txt"
  mv "$out/next.npy" "$out/state.npy" # the states after the call are those before the next one
  position=$((position + count))
  ids=$(python3 -c 'import numpy, sys; print(numpy.load(sys.argv[1])[0, -1].argmax())' "$out/logits.npy")
  tokens+=("$ids")
done
echo "${tokens[@]}"
