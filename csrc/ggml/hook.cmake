# Included by the patched llama.cpp after its own targets exist: adds pytq's sources to them.
# PYTQ_DIR is pytq's source tree.
get_filename_component(PYTQ_DIR ${CMAKE_CURRENT_LIST_DIR}/../.. ABSOLUTE)
add_subdirectory(${PYTQ_DIR} ${CMAKE_BINARY_DIR}/pytq)

target_include_directories(ggml-base PUBLIC $<BUILD_INTERFACE:${PYTQ_DIR}/csrc> $<BUILD_INTERFACE:${PYTQ_DIR}/csrc/ggml>)

# The codecs live once, in ggml-base; every other library finds them there.
target_sources(ggml-base PRIVATE $<TARGET_OBJECTS:pytq> ${PYTQ_DIR}/csrc/ggml/pytq-ggml.c)
target_sources(ggml-cpu PRIVATE ${PYTQ_DIR}/csrc/ggml/pytq-flash-attn.cpp)
target_sources(llama PRIVATE ${PYTQ_DIR}/csrc/ggml/pytq-kv.cpp ${PYTQ_DIR}/csrc/ggml/pytq-profile.cpp)
