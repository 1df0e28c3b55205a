#!/usr/bin/env bash
# Builds a source tree with CUDA (only what the runs need), tests the backend's ops and measures with llama-bench.
#
#   full_run.sh build  SRC.tar BUILD     unpack and build llama-bench and test-backend-ops for sm_90a
#   full_run.sh model  VOCAB.gguf GGUF.whl MODEL.gguf
#   full_run.sh tests  BUILD OUT         test-backend-ops on CUDA0 against the CPU, compressed types only
#   full_run.sh bench  OUT MODEL BUILD:TYPE_K[/TYPE_V] ...   one llama-bench process per entry, in the order given
#
# Matrix-product instances for quantisations the model does not use are left out of the build (their symbols stay unresolved
# and are never called), which saves half of the compile time.
set -eu
here=$(cd "$(dirname "$0")/../.." && pwd)
step=$1
shift
case $step in
    build)
        src=$2/src
        mkdir -p "$src" "$2/b"
        tar xf "$1" -C "$src"
        echo 'add_subdirectory(llama-bench)' > "$src/tools/CMakeLists.txt"
        printf 'add_executable(test-backend-ops test-backend-ops.cpp)\ntarget_link_libraries(test-backend-ops PRIVATE llama llama-common)\n' > "$src/tests/CMakeLists.txt"
        find "$src/ggml/src/ggml-cuda/template-instances" -name 'mmq-instance-*' ! -name '*-q4_0.cu' ! -name '*-q6_k.cu' ! -name '*-q8_0.cu' -delete
        cmake -S "$src" -B "$2/b" -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_CUDA=ON -DGGML_NATIVE=ON -DCMAKE_CUDA_ARCHITECTURES=90a-real \
            -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_TOOLS=ON -DLLAMA_BUILD_TESTS=ON \
            -DGGML_CUDA_COMPRESSION_MODE=none -DPYTQ_DIR="$here" \
            -DCMAKE_SHARED_LINKER_FLAGS='-Wl,-z,lazy' -DCMAKE_EXE_LINKER_FLAGS='-Wl,-z,lazy -Wl,--allow-shlib-undefined' > "$2/cmake.log" 2>&1 || { tail -n 30 "$2/cmake.log"; exit 1; }
        ninja -C "$2/b" llama-bench $( [ "${NO_TESTS:-}" ] || echo test-backend-ops ) > "$2/ninja.log" 2>&1 || { grep -E "error|FAILED|undefined" "$2/ninja.log" | head -n 40; exit 1; }
        ;;
    model)
        python3 -m pip install -q --no-index --no-deps --target /tmp/site "$2"
        PYTHONPATH=/tmp/site python3 "$(dirname "$1")/make_random_gguf.py" "$1" "$3"
        ;;
    tests)
        "$1/b/bin/test-backend-ops" test -b CUDA0 -o SET_ROWS -p 'type_dst=(kv|turbo)' > "$2/test_set_rows.log" 2>&1 || true
        "$1/b/bin/test-backend-ops" test -b CUDA0 -o GET_ROWS -p 'type=(kv|turbo)' > "$2/test_get_rows.log" 2>&1 || true
        "$1/b/bin/test-backend-ops" test -b CUDA0 -o CPY -p '(kv|turbo)' > "$2/test_cpy.log" 2>&1 || true
        "$1/b/bin/test-backend-ops" test -b CUDA0 -o FLASH_ATTN_EXT -p 'type_V=(kv|turbo)' > "$2/test_flash_attn.log" 2>&1 || true
        PYTQ_CUDA_SLICE=256 "$1/b/bin/test-backend-ops" test -b CUDA0 -o FLASH_ATTN_EXT -p 'type_V=(kv|turbo)' > "$2/test_flash_attn_slices.log" 2>&1 || true
        for f in "$2"/test_*.log; do
            echo "$(basename "$f"): $(grep -c ' OK' "$f" || true) ok, $(grep -c 'FAIL' "$f" || true) fail, $(grep -c 'not supported' "$f" || true) not supported; $(tail -n 1 "$f")"
            grep FAIL "$f" | head -n 4 || true
        done
        ;;
    bench)
        out=$1 model=$2
        shift 2
        for e in "$@"; do
            build=${e%%:*} types=${e#*:}
            k=${types%%/*} v=${types##*/}
            "$build/b/bin/llama-bench" -m "$model" -ngl 99 -fa 1 -p 512 -n 32 -d "${DEPTHS:-0,16384,65536}" -r "${REPS:-3}" -ctk "$k" -ctv "$v" -o jsonl \
                2> "$out/bench_err.log" | sed "s|^{|{\"pytq_build\": \"$(basename "$build")\", |" | tee -a "$out/bench.jsonl" |
                python3 -c "
import json, sys
for l in sys.stdin:
    r = json.loads(l)
    print(r['pytq_build'], r['type_k'], r['type_v'], 'pp' if r['n_prompt'] else 'tg', '@', r['n_depth'], round(r['avg_ts'], 1), '+-', round(r['stddev_ts'], 1), flush=True)
" || tail -n 5 "$out/bench_err.log"
        done
        ;;
esac
