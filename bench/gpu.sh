#!/usr/bin/env bash
# Everything worth knowing from one run on a machine with a GPU and no network, in under nine minutes.
#
#     bench/gpu.sh [--out DIR] [--data PATH] [--device cuda] [--tiny] [PART ...]
#
# Parts: versions kernels-check equality kernels iterations profile train, all without a name; and peers, by name alone. Each writes DIR/PART.log and,
# where it has numbers, JSON; one that fails is reported and the next one runs. Exit status: parts that failed.
# --tiny rehearses the script on a CPU: small sizes, Triton's interpreter for the kernels.
set -u
cd "$(dirname "$0")/.."
out=${OUT:-bench/results/gpu}
device=cuda
data=${MAMLPP_FAST_DATA:-}
tiny=
parts=()
while (($#)); do
  case $1 in
    --out) out=$2 && shift ;;
    --data) data=$2 && shift ;;
    --device) device=$2 && shift ;;
    --tiny) tiny=1 ;;
    -*) echo "gpu.sh: error: expected --out, --data, --device or --tiny, got $1" >&2 && exit 2 ;;
    *) parts+=("$1") ;;
  esac
  shift
done
((${#parts[@]})) || parts=(versions kernels-check equality kernels iterations profile train)
mkdir -p "$out"
python=${PYTHON:-python3}

# Without an installation: the package with its kernels inside it, as setup.py arranges them.
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
cp -r mamlpp_fast "$site/" && rm -rf "$site/mamlpp_fast/kernels" && cp -r kernels "$site/mamlpp_fast/kernels"
export PYTHONPATH="$site:$PWD" PYTHONUNBUFFERED=1
[[ $tiny ]] || export MAMLPP_FAST_NATIVE=${MAMLPP_FAST_NATIVE:-0}

run_part() {
  case $1 in
    versions)
      nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem --format=csv 2>/dev/null
      "$python" -m mamlpp_fast info && "$python" -m mamlpp_fast info --json >"$out/info.json"
      ;;
    kernels-check)
      if [[ $tiny ]]; then
        "$python" -m bench.kernels --check --device "$device" --groups lslr
      else
        "$python" -m bench.kernels --check --device "$device"
      fi
      ;;
    equality) "$python" -m bench.gpu_equality --device "$device" ${tiny:+--tiny} ;;
    kernels)
      "$python" -m bench.kernels --device "$device" ${tiny:+--groups lslr} --seconds "${tiny:+0.1}${tiny:-0.3}" \
        --json "$out/kernels.json"
      ;;
    iterations)
      local engines=reference,autograd,fused,fused:tf32,fused:bfloat16 workloads=()
      [[ $tiny ]] && engines=reference,fused && workloads=(--workloads omniglot-5w1s-final)
      "$python" -m bench.iterations --device "$device" --engines "$engines" "${workloads[@]}" --seconds 3 \
        --json "$out/iterations.json"
      ;;
    peers)
      # What needs nothing but the torch that is there; the others need a network, see bench/peers/environments.py.
      local some=(--rounds 8 --workloads omniglot-20w1s-final,omniglot-20w1s)
      [[ $tiny ]] && some=(--rounds 2 --workloads tiny)
      "$python" -m bench.peers --here --device "$device" --peers textbook,torch.func,ours-autograd,ours-fused \
        "${some[@]}" --json "$out/peers.json"
      ;;
    profile)
      local first=omniglot-20w1s
      [[ $tiny ]] && first=omniglot-5w1s-final
      "$python" -m bench.profile "$first" --device "$device" --json "$out/profile.json"
      ;;
    train)
      local budget=(--set epochs=20 iterations_per_epoch=500 msl_epochs=3 val_tasks=200)
      [[ $tiny ]] && budget=(--set epochs=1 iterations_per_epoch=2 val_tasks=2 test_tasks=2)
      local preset=omniglot-20w1s source=(--data "$data")
      [[ -z $data ]] && preset=strokes source=()
      timeout 130 "$python" -m mamlpp_fast train $preset "${source[@]}" --device "$device" --out "$out/train" \
        "${budget[@]}"
      local status=$?
      # The time limit is how this part ends: SIGTERM saves the run.
      ((status == 124)) && status=0
      rm -rf "$out/train/checkpoints"
      return $status
      ;;
    *) echo "gpu.sh: unknown part $1" && return 2 ;;
  esac
}

declare -A limit=([versions]=60 [kernels-check]=90 [equality]=120 [kernels]=120 [iterations]=150 [peers]=240 [profile]=60 [train]=150)
failed=0
summary=
for part in "${parts[@]}"; do
  echo "== $part"
  began=$SECONDS
  export -f run_part
  export out device data tiny python
  timeout "${limit[$part]:-120}" bash -c "run_part $part" 2>&1 | tee "$out/$part.log"
  status=${PIPESTATUS[0]}
  ((status)) && failed=$((failed + 1))
  summary+=$(printf '%-14s %-10s %4d s' "$part" "$( ((status)) && echo "FAILED $status" || echo ok)" $((SECONDS - began)))$'\n'
done
echo "== summary"
printf '%s' "$summary" | tee "$out/summary.txt"
exit $failed
