#!/usr/bin/env bash
# Checks all trainers on a machine with a GPU, unattended, in less than eight minutes:
#
#     scripts/gpu_check.sh OUT
#
# in an environment with `pip install ".[dev]"`. On a phantom data set it measures steps in half precision and their
# peak memory, not compiled for all trainers and compiled for nine, at a 128^3 patch and at the left atrium's
# 112x112x80. Networks see four samples a step (of semi-supervised trainers two of them unlabelled, of copy-paste one,
# which is mixed both ways, of dual k-means a labelled and an unlabelled one in two views). A loss that is not finite
# fails. Where $nnUNet_raw has Dataset002_LeftAtrium, it then starts the published left-atrium protocol. OUT gets the
# tables as JSON, a log for each stage and summary.txt; the status is 0 if nothing failed.
# DEVICE=cpu PATCHES="32,32,32 16,32,32" SCALE=cpu tries the script itself.
set -uo pipefail
OUT=$(mkdir -p "${1:?usage: gpu_check.sh OUT}" && cd "$1" && pwd)
[ -z "$(ls -A "$OUT")" ] || { echo "$OUT is not empty" >&2; exit 2; }
LEFT_ATRIUM=$(realpath -q "${nnUNet_raw:-}/Dataset002_LeftAtrium")
cd "$(dirname "${BASH_SOURCE[0]}")" || exit
DEADLINE=460 # seconds, for all stages together
DEVICE=${DEVICE:-cuda}
export nnUNet_extTrainer=${nnUNet_extTrainer:-$(cd ../trainers && pwd)}
PATCHES=${PATCHES:-128,128,128 80,112,112}
ROUNDS=${ROUNDS:-8}
SCALE=${SCALE:-published}
OURS=$(timeout 60 nnUNetv2_selfreg trainers | grep -o '^nnUNetTrainer[^ ]*') || { echo "no trainers found" >&2; exit 2; }
NETWORKS=$(grep -E 'UXNet|Swin' <<<"$OURS")
OURS=$(grep -vE 'UXNet|Swin' <<<"$OURS")
COMPILED="nnUNetTrainerSelfReg nnUNetTrainerMeanTeacher nnUNetTrainerDualTask nnUNetTrainerDualTaskMutual nnUNetTrainerCopyPaste
nnUNetTrainerUXNet nnUNetTrainerKMaxUXNet nnUNetTrainerDualKMaxUXNet nnUNetTrainerSelfRegSwinUNETR"
export nnUNet_raw=$OUT/nnUNet_raw nnUNet_preprocessed=$OUT/nnUNet_preprocessed nnUNet_results=$OUT/nnUNet_results

stage() { # name, limit in seconds, command: what fails or takes too long is noted, and the next stage begins
    local name=$1 limit=$2 begin=$SECONDS status
    shift 2
    [ $((DEADLINE - SECONDS)) -lt "$limit" ] && limit=$((DEADLINE - SECONDS > 1 ? DEADLINE - SECONDS : 1))
    timeout --kill-after=10 "$limit" "$@" >"$OUT/$name.log" 2>&1
    status=$?
    # that training takes longer than there is time: an epoch is enough
    [ $status = 124 ] && [ "$name" = left-atrium ] && grep -q "Epoch time" "$OUT"/runs/*/*/log.txt && status=0
    [ $status = 0 ] && status=passed || status="FAILED with status $status, see $name.log"
    echo "$name: $status ($((SECONDS - begin)) s)" | tee -a "$OUT/summary.txt"
}

steps() { # compile t or f, patch, limit, trainers
    local compile=$1 patch=$2 limit=$3 name=steps-${2//,/x}-$([ "$1" = t ] && echo compiled || echo eager)-${@: -1}
    shift 3
    nnUNet_compile=$compile stage "$name" "$limit" python measure/step_time.py 997 "3d_${patch//,/x}" -f 5 -device "$DEVICE" \
        -b 4 --rounds "$ROUNDS" --without-loading -o "$OUT/$name.json" -tr "$@"
    grep '^|' "$OUT/$name.log"
}

: >"$OUT/summary.txt"
stage machine 10 bash -c 'nvidia-smi; nproc; python --version; pip list 2>/dev/null | grep -iE "nnunet|^torch|monai|triton"'
# shellcheck disable=SC2086 # lists of words
{
    stage data 90 python gpu_check_data.py $PATCHES
    for patch in $PATCHES; do steps f "$patch" 70 nnUNetTrainer $OURS; steps f "$patch" 70 nnUNetTrainer $NETWORKS; done
    # one at a time, beside stock: compiling takes long, and a stage that is cut off leaves no numbers
    for trainer in $COMPILED; do for patch in $PATCHES; do steps t "$patch" 60 nnUNetTrainer "$trainer"; done; done
}
if [ -d "${LEFT_ATRIUM:-/nowhere}" ]; then
    ln -sfn "$LEFT_ATRIUM" "$nnUNet_raw/Dataset002_LeftAtrium"
    nnUNet_compile=f stage left-atrium 140 nnUNetv2_selfreg benchmark run left-atrium-8 --scale "$SCALE" -device "$DEVICE" -o "$OUT/runs" \
        -tr nnUNetTrainerCopyPaste
    grep -h "Epoch time" "$OUT"/runs/*/*/log.txt
else
    echo "left-atrium: skipped, nnUNet_raw has no Dataset002_LeftAtrium" | tee -a "$OUT/summary.txt"
fi
! grep -q FAILED "$OUT/summary.txt"
