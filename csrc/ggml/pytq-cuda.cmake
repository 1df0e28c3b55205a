# Adds the CUDA kernels to ggml-cuda. PYTQ_CUDA_ALL_PAIRS compiles the decode kernel for every pair of K and V types.
option(PYTQ_CUDA_ALL_PAIRS "pytq: decode attention for every pair of K and V types" OFF)
file(GLOB PYTQ_CUDA_SOURCES ${PYTQ_DIR}/csrc/ggml/pytq-cuda*.cu)
target_sources(ggml-cuda PRIVATE ${PYTQ_CUDA_SOURCES})
get_target_property(PYTQ_GGML_CUDA_DIR ggml-cuda SOURCE_DIR)
target_include_directories(ggml-cuda PRIVATE ${PYTQ_DIR}/csrc ${PYTQ_DIR}/csrc/ggml ${PYTQ_GGML_CUDA_DIR})
if (PYTQ_CUDA_ALL_PAIRS)
    target_compile_definitions(ggml-cuda PRIVATE PYTQ_CUDA_ALL_PAIRS)
endif()
