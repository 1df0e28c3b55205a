#!/usr/bin/env bash
# Builds the op-level harnesses (op_bench.cu: encoder and decoder, attention_bench.cu: attention of few queries,
# prefill_bench.cu: of many), checks the kernels, runs compute-sanitizer on small sizes and times them.
# Usage: tools/gpu/op_bench.sh OUTDIR [check|time|sanitize|ncu ...]   (default: check time)
# SHORT=0: short caches by the kernel for long ones too; SHORT=8: by their own, as a model does.
set -eu
cd "$(dirname "$0")/../.."
out=$1
shift
[ $# -gt 0 ] || set -- check time
build=$(mktemp -d)
gcc -std=c11 -O2 -ffp-contract=off -c csrc/ref/codec.c -o "$build/codec.o"
gcc -std=c11 -O2 -c csrc/ref/types.c -o "$build/types.o"
jobs=
for harness in op_bench attention_bench prefill_bench; do
    nvcc -std=c++17 -O3 -lineinfo -gencode arch=compute_90a,code=sm_90a --split-compile=8 -DMORE -c tools/gpu/$harness.cu -o "$build/$harness.o" &
    jobs="$jobs $!"
done
for j in $jobs; do wait "$j"; done
for harness in op_bench attention_bench prefill_bench; do
    nvcc "$build/$harness.o" "$build/codec.o" "$build/types.o" -o "$build/$harness"
done
for mode in "$@"; do
    case $mode in
        check | time)
            for harness in op_bench attention_bench prefill_bench; do SHORT=0 "$build/$harness" "$mode" | tee "$out/${harness}_$mode.jsonl"; done
            sizes=; [ "$mode" = check ] || sizes="256 512 1024"
            # shellcheck disable=SC2086
            SHORT=8 "$build/attention_bench" "$mode" $sizes | tee "$out/attention_short_$mode.jsonl" ;;
        sanitize)
            for tool in memcheck racecheck; do
                for harness in attention_bench prefill_bench; do
                    SHORT=8 timeout 150 compute-sanitizer --tool $tool "$build/$harness" sanitize > "$out/sanitize_${tool}_$harness.log" 2>&1 || true
                    tail -n 3 "$out/sanitize_${tool}_$harness.log"
                done
                SHORT=0 timeout 150 compute-sanitizer --tool $tool "$build/attention_bench" sanitize > "$out/sanitize_${tool}_decode.log" 2>&1 || true
                tail -n 3 "$out/sanitize_${tool}_decode.log"
            done ;;
        ncu)  # per-instruction stall samples of the decode kernel and of the encoder
            ncu --clock-control none --kernel-name regex:attention_decode --launch-skip 8 --launch-count 1 --set full --import-source no \
                -o "$build/a" "$build/attention_bench" time 65536 > "$out/ncu.log" 2>&1 || true
            ncu --clock-control none --kernel-name regex:encode --launch-skip 30 --launch-count 1 --set full --import-source no \
                -o "$build/e" "$build/op_bench" time >> "$out/ncu.log" 2>&1 || true
            ncu --clock-control none --kernel-name regex:attention_prefill --launch-count 1 --set full --import-source no \
                -o "$build/p" "$build/prefill_bench" profile >> "$out/ncu.log" 2>&1 || true
            for r in a e p; do
                ncu --import "$build/$r.ncu-rep" --page details --print-details all > "$out/ncu_$r.txt" 2>&1 || true
                ncu --import "$build/$r.ncu-rep" --page source --print-units base --csv > "$out/ncu_$r.csv" 2>&1 || true
                gzip -f "$out/ncu_$r.csv" || true
                grep -E "Duration|Executed Ipc Active|Issued Warp Per|stall" "$out/ncu_$r.txt" | head -40 || true
            done ;;
    esac
done
