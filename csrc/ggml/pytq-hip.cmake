# Adds the kernels to ggml-hip: the CUDA sources without those of NVIDIA's tensor cores, and the portable attention.
file(GLOB PYTQ_HIP_SOURCES ${PYTQ_DIR}/csrc/ggml/pytq-portable*.cu)
list(APPEND PYTQ_HIP_SOURCES ${PYTQ_DIR}/csrc/ggml/pytq-cuda.cu ${PYTQ_DIR}/csrc/ggml/pytq-cuda-fuse.cu)
target_sources(ggml-hip PRIVATE ${PYTQ_HIP_SOURCES})
get_target_property(PYTQ_GGML_CUDA_DIR ggml-hip SOURCE_DIR)
set(PYTQ_GGML_CUDA_DIR ${PYTQ_GGML_CUDA_DIR}/../ggml-cuda)
target_include_directories(ggml-hip PRIVATE ${PYTQ_DIR}/csrc ${PYTQ_DIR}/csrc/ggml ${PYTQ_GGML_CUDA_DIR})
# as ggml-hip's own CMakeLists.txt treats its sources; the property is seen by the directory of the target only
if (CXX_IS_HIPCC OR CMAKE_CXX_COMPILER MATCHES "hipcc(\\.bat)?$")
    set(PYTQ_HIP_LANGUAGE CXX)
else()
    set(PYTQ_HIP_LANGUAGE HIP)
endif()
set_source_files_properties(${PYTQ_HIP_SOURCES} TARGET_DIRECTORY ggml-hip PROPERTIES LANGUAGE ${PYTQ_HIP_LANGUAGE})
