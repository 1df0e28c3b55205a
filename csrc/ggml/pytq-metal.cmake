# Adds the Metal kernels to ggml-metal: the text of csrc/metal/pytq.metal with everything it includes becomes a C++ string, which
# pytq-metal.cpp hands to the device's compiler when a compressed type is first used.
#
# As a script it only writes that text:  cmake -DPYTQ_DIR=DIR -DPYTQ_METAL_OUT=FILE -P pytq-metal.cmake

# Replaces every #include "..." by the file's text; names are relative to csrc/metal.
function(pytq_metal_flatten result files)
    set(base ${PYTQ_DIR}/csrc/metal)
    file(READ ${base}/pytq.metal text)
    set(used ${base}/pytq.metal)
    while (text MATCHES "#include \"([^\"\n]+)\"")
        set(name ${CMAKE_MATCH_1})
        set(path ${base}/${name})
        if (NOT EXISTS ${path})
            set(path ${PYTQ_DIR}/csrc/${name}) # layout.h includes its neighbour
        endif()
        file(READ ${path} part)
        string(REPLACE "#pragma once" "" part "${part}")
        string(REPLACE "#include \"${name}\"" "${part}" text "${text}")
        list(APPEND used ${path})
    endwhile()
    set(${result} "${text}" PARENT_SCOPE)
    set(${files} ${used} PARENT_SCOPE)
endfunction()

pytq_metal_flatten(PYTQ_METAL_TEXT PYTQ_METAL_FILES)
if (CMAKE_SCRIPT_MODE_FILE)
    file(WRITE ${PYTQ_METAL_OUT} "${PYTQ_METAL_TEXT}")
    return()
endif()

# The text is written when CMake runs, so an edit of the kernels runs CMake again; an unchanged text recompiles nothing.
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${PYTQ_METAL_FILES})
set(PYTQ_METAL_GENERATED ${CMAKE_BINARY_DIR}/pytq-metal)
file(WRITE ${PYTQ_METAL_GENERATED}/pytq-metal-source.inc.tmp "R\"PYTQ(${PYTQ_METAL_TEXT})PYTQ\"\n")
file(COPY_FILE ${PYTQ_METAL_GENERATED}/pytq-metal-source.inc.tmp ${PYTQ_METAL_GENERATED}/pytq-metal-source.inc ONLY_IF_DIFFERENT)

target_sources(ggml-metal PRIVATE ${PYTQ_DIR}/csrc/ggml/pytq-metal.cpp)
get_target_property(PYTQ_GGML_METAL_DIR ggml-metal SOURCE_DIR)
target_include_directories(ggml-metal PRIVATE ${PYTQ_DIR}/csrc ${PYTQ_DIR}/csrc/ggml ${PYTQ_GGML_METAL_DIR} ${PYTQ_METAL_GENERATED})
