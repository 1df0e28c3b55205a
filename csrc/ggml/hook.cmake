# Included by the patched llama.cpp after its libraries are declared: adds pytq's sources to them.
#
# Include directories go to single files, not to targets: every other file is then compiled by the same command as in a stock
# build, so a tree that was built before the series was applied rebuilds only what the series touches.
get_filename_component(PYTQ_DIR ${CMAKE_CURRENT_LIST_DIR}/../.. ABSOLUTE)
set(PYTQ_INCLUDE ${PYTQ_DIR}/csrc ${PYTQ_DIR}/csrc/ggml)
add_subdirectory(${PYTQ_DIR} ${CMAKE_BINARY_DIR}/pytq)

function(pytq_include target)
    if (NOT TARGET ${target})
        return()
    endif()
    get_target_property(dir ${target} SOURCE_DIR)
    foreach(file ${ARGN})
        cmake_path(ABSOLUTE_PATH file BASE_DIRECTORY ${dir} NORMALIZE)
        set_property(SOURCE ${file} TARGET_DIRECTORY ${target} APPEND PROPERTY INCLUDE_DIRECTORIES ${PYTQ_INCLUDE})
    endforeach()
endfunction()

# The codecs live once, in ggml-base; every other library finds them there.
target_sources(ggml-base PRIVATE $<TARGET_OBJECTS:pytq> ${PYTQ_DIR}/csrc/ggml/pytq-ggml.c ${PYTQ_DIR}/csrc/ggml/pytq-fuse.cpp)
set(PYTQ_GGML_CPU_SOURCES ${PYTQ_DIR}/csrc/ggml/pytq-flash-attn.cpp ${PYTQ_DIR}/csrc/ggml/pytq-cpu-fuse.cpp)
target_sources(ggml-cpu PRIVATE ${PYTQ_GGML_CPU_SOURCES})
target_sources(llama PRIVATE
    ${PYTQ_DIR}/csrc/ggml/pytq-kv.cpp ${PYTQ_DIR}/csrc/ggml/pytq-cache-keys.cpp ${PYTQ_DIR}/csrc/ggml/pytq-profile.cpp)
# a patched header of llama reaches all its files
target_include_directories(llama PRIVATE ${PYTQ_INCLUDE})
if (TARGET ggml-cuda)
    include(${CMAKE_CURRENT_LIST_DIR}/pytq-cuda.cmake)
endif()
if (TARGET ggml-hip)
    include(${CMAKE_CURRENT_LIST_DIR}/pytq-hip.cmake)
endif()
if (TARGET ggml-metal)
    include(${CMAKE_CURRENT_LIST_DIR}/pytq-metal.cmake)
endif()

function(pytq_include_all)
    pytq_include(ggml-base ggml.c ${PYTQ_DIR}/csrc/ggml/pytq-ggml.c ${PYTQ_DIR}/csrc/ggml/pytq-fuse.cpp)
    pytq_include(ggml-cpu ggml-cpu/ggml-cpu.c ggml-cpu/ggml-cpu.cpp ggml-cpu/ops.cpp ${PYTQ_GGML_CPU_SOURCES})
    pytq_include(llama-common arg.cpp)
    pytq_include(llama-bench-impl llama-bench.cpp)
    pytq_include(test-backend-ops test-backend-ops.cpp)
endfunction()
cmake_language(DEFER DIRECTORY ${CMAKE_SOURCE_DIR} CALL pytq_include_all)
