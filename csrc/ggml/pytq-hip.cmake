# Adds the kernels to ggml-hip: the CUDA sources without those of NVIDIA's tensor cores, and the portable attention.
file(GLOB PYTQ_HIP_SOURCES ${PYTQ_DIR}/csrc/ggml/pytq-portable*.cu)
list(APPEND PYTQ_HIP_SOURCES ${PYTQ_DIR}/csrc/ggml/pytq-cuda.cu ${PYTQ_DIR}/csrc/ggml/pytq-cuda-fuse.cu)
target_sources(ggml-hip PRIVATE ${PYTQ_HIP_SOURCES})
# upstream's files but two keep the commands of a stock build, and so their objects
pytq_include(ggml-hip ../ggml-cuda/ggml-cuda.cu ../ggml-cuda/mmvq.cu ${PYTQ_HIP_SOURCES})
get_target_property(PYTQ_GGML_HIP_DIR ggml-hip SOURCE_DIR)
set_property(SOURCE ${PYTQ_HIP_SOURCES} TARGET_DIRECTORY ggml-hip APPEND PROPERTY
    INCLUDE_DIRECTORIES ${PYTQ_GGML_HIP_DIR}/../ggml-cuda)
# as ggml-hip's own CMakeLists.txt treats its sources
if (CMAKE_CXX_COMPILER MATCHES "hipcc(\\.bat)?$")
    set(PYTQ_HIP_LANGUAGE CXX)
else()
    set(PYTQ_HIP_LANGUAGE HIP)
endif()
set_source_files_properties(${PYTQ_HIP_SOURCES} TARGET_DIRECTORY ggml-hip PROPERTIES LANGUAGE ${PYTQ_HIP_LANGUAGE})
