#!/usr/bin/env bash
# What is most worth knowing from one run on a machine with a GPU and no network, in nine minutes.
#
#     bench/gpu.sh [--out DIR] [--data PATH] [--device cuda] [--tiny] [PART ...]
#
# Parts: first-step omniglot profile equality mini-imagenet kernels train, all without a name; and peers, by name alone.
# Each writes DIR/PART.log and, where it has numbers, JSON, after each engine; one that fails is reported and the next
# one runs, with the time that is left over. DIR/all.tar.gz holds all that there is, made anew after each part. Without
# --out, where a lent machine names a folder in OUT, only that archive and the summary go there: few files return.
# Exit status: parts that failed.
# --data: Omniglot's images, for train, which fails without. A machine without a network has it from a folder that
# git ignores and that is carried there.
# --tiny rehearses the script on a CPU: small sizes, Triton's interpreter for the kernels.
set -u
cd "$(dirname "$0")/.."
out=
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
((${#parts[@]})) || parts=(first-step omniglot profile equality mini-imagenet kernels train)
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
returned=
[[ $out ]] || returned=${OUT-}
[[ $returned ]] && out=$site/found
out=${out:-bench/results/gpu}
mkdir -p "$out" ${returned:+"$returned"}
python=${PYTHON:-python3}

# Without an installation: the package with its kernels inside it, as setup.py arranges them. The safe path keeps the
# checkout, which has no kernels inside the package, from coming first.
cp -r mamlpp_fast "$site/" && rm -rf "$site/mamlpp_fast/kernels" && cp -r kernels "$site/mamlpp_fast/kernels"
export PYTHONPATH="$site:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
[[ $tiny ]] || export MAMLPP_FAST_NATIVE=${MAMLPP_FAST_NATIVE:-0}

# iterations WORKLOAD SECONDS ENGINE...: each by itself, so that the first is written before the second begins
iterations() {
  local workload=$1 seconds=$2 failed=0
  shift 2
  for engine; do
    "$python" -m bench.iterations --device "$device" --engines "$engine" --workloads "$workload" --seconds "$seconds" \
      --json "$out/$workload-${engine/:/-}${kind-}.json" || failed=1
  done
  return $failed
}

run_part() {
  case $1 in
    first-step)
      nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem --format=csv 2>/dev/null
      "$python" -m mamlpp_fast info --json >"$out/info.json" && cat "$out/info.json" &&
        "$python" -m bench.gpu_equality --device "$device" --first ${tiny:+--tiny}
      ;;
    omniglot)
      if [[ $tiny ]]; then
        iterations omniglot-5w1s-final 0.1 fused
      else
        # float32 by three products of TF32, then exact.
        local failed=0
        iterations omniglot-20w1s 3 fused || failed=1
        kind=-ieee MAMLPP_FAST_PRODUCTS=ieee iterations omniglot-20w1s 3 fused || failed=1
        iterations omniglot-20w1s 3 fused:bfloat16 fused:tf32 autograd reference || failed=1
        return $failed
      fi
      ;;
    profile)
      local first=omniglot-20w1s
      [[ $tiny ]] && first=omniglot-5w1s-final
      "$python" -m bench.profile "$first" --device "$device" --json "$out/profile.json"
      ;;
    equality) "$python" -m bench.gpu_equality --device "$device" ${tiny:+--tiny} ;;
    mini-imagenet) iterations miniimagenet-5w1s 3 fused fused:bfloat16 fused:tf32 ;;
    kernels)
      # Those that the fused engine launches; the check of each comes before its time.
      local groups=conv,norm-act-pool,first-layer,head seconds=0.2
      [[ $tiny ]] && groups=lslr seconds=0.1
      "$python" -m bench.kernels --device "$device" --groups "$groups" --seconds "$seconds" --json "$out/kernels.json"
      ;;
    peers)
      # What needs nothing but the torch that is there; the others need a network, see bench/peers/environments.py.
      local some=(--rounds 8 --workloads omniglot-20w1s-final,omniglot-20w1s)
      [[ $tiny ]] && some=(--rounds 2 --workloads tiny)
      "$python" -m bench.peers --here --device "$device" --peers textbook,torch.func,ours-autograd,ours-fused \
        "${some[@]}" --json "$out/peers.json"
      ;;
    train)
      [[ $data ]] || { echo "gpu.sh: train: expected Omniglot's images by --data, got none" >&2; return 1; }
      # As many epochs of 500 iterations as end, with their test, in the time that there is.
      local epochs
      epochs=$("$python" -c '
import json, sys
try:
    (row,) = json.load(open(sys.argv[1]))["rows"]
    print(max(1, min(40, int(60e3 / row["ms"][1] / 500))))
except (OSError, KeyError, ValueError):
    print(4)' "$out/omniglot-20w1s-fused.json")
      local budget=(--set epochs="$epochs" iterations_per_epoch=500 msl_epochs=3 val_tasks=200)
      [[ $tiny ]] && budget=(--set epochs=1 iterations_per_epoch=2 val_tasks=2 test_tasks=2)
      "$python" -m mamlpp_fast train omniglot-20w1s --data "$data" --device "$device" --out "$out/train" "${budget[@]}"
      local status=$?
      rm -rf "$out/train/checkpoints"
      return $status
      ;;
    *) echo "gpu.sh: unknown part $1" && return 2 ;;
  esac
}

declare -A limit=([first-step]=50 [omniglot]=130 [profile]=40 [equality]=80 [mini-imagenet]=60 [kernels]=70 [train]=110
  [peers]=240)
failed=0
left=0
summary=
export -f run_part iterations
export out device data tiny python
for part in "${parts[@]}"; do
  echo "== $part"
  began=$SECONDS
  may=$((${limit[$part]:-120} + left))
  timeout -k 5 "$may" bash -c "run_part $part" 2>&1 | tee "$out/$part.log"
  status=${PIPESTATUS[0]}
  ((status)) && failed=$((failed + 1))
  left=$((may - SECONDS + began))
  summary+=$(printf '%-14s %-10s %4d s' "$part" "$( ((status)) && echo "FAILED $status" || echo ok)" $((SECONDS - began)))$'\n'
  printf '%s' "$summary" >"$out/summary.txt"
  # Whole or not at all, wherever the script is stopped.
  tar -czf "$site/all.tar.gz" -C "$out" --exclude=./all.tar.gz --exclude=./all.new . 2>/dev/null
  for folder in "$out" ${returned:+"$returned"}; do
    cp "$site/all.tar.gz" "$folder/all.new" && mv "$folder/all.new" "$folder/all.tar.gz"
  done
  [[ $returned ]] && cp "$out/summary.txt" "$returned/"
done
echo "== summary"
cat "$out/summary.txt"
exit $failed
