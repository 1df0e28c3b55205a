# Adds the CUDA kernels to ggml-cuda. PYTQ_CUDA_ALL_PAIRS compiles the decode kernel for every pair of K and V types.
option(PYTQ_CUDA_ALL_PAIRS "pytq: decode attention for every pair of K and V types" OFF)
file(GLOB PYTQ_CUDA_SOURCES ${PYTQ_DIR}/csrc/ggml/pytq-cuda*.cu)
target_sources(ggml-cuda PRIVATE ${PYTQ_CUDA_SOURCES})
# upstream's files but one keep the commands of a stock build, and so their objects
pytq_include(ggml-cuda ggml-cuda.cu ${PYTQ_CUDA_SOURCES})
get_target_property(PYTQ_GGML_CUDA_DIR ggml-cuda SOURCE_DIR)
set_property(SOURCE ${PYTQ_CUDA_SOURCES} TARGET_DIRECTORY ggml-cuda APPEND PROPERTY INCLUDE_DIRECTORIES ${PYTQ_GGML_CUDA_DIR})
if (PYTQ_CUDA_ALL_PAIRS)
    set_property(SOURCE ${PYTQ_CUDA_SOURCES} TARGET_DIRECTORY ggml-cuda APPEND PROPERTY COMPILE_DEFINITIONS PYTQ_CUDA_ALL_PAIRS)
endif()
