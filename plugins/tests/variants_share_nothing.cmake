# Fails where a variant's object file defines a weak symbol: the linker keeps one copy of each, and
# might keep the one compiled for instructions that the running processor lacks.
execute_process(COMMAND "${NM}" -A -C --defined-only "${LIBRARY}"
    OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "[^\n]*(variant|dots)_[a-z0-9]+[^\n]* [WVu] [^\n]*" weak "${symbols}")
if(weak)
    list(JOIN weak "\n" lines)
    message(FATAL_ERROR "Variants define symbols that the linker may merge:\n${lines}")
endif()
