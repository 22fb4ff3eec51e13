# A library that other machines can load: the Clang that the package ziglang carries, for either
# processor, with no container. Undefined symbols are those of the glibc that the dependencies of
# nmexport ask for (the wheels of onnxruntime and torch are manylinux_2_28); the C++ library is
# linked in and exports nothing.
#
# Give NMEXPORT_ZIG (path of the program) and NMEXPORT_MACHINE (x86_64 or aarch64).
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR "${NMEXPORT_MACHINE}")
set(CMAKE_TRY_COMPILE_PLATFORM_VARIABLES NMEXPORT_ZIG NMEXPORT_MACHINE)

set(CMAKE_CXX_COMPILER "${NMEXPORT_ZIG};c++;-target;${NMEXPORT_MACHINE}-linux-gnu.2.28")
# Its own archiver: the machine's may know objects of its own processor alone.
set(CMAKE_AR "${NMEXPORT_ZIG}" CACHE FILEPATH "" FORCE)
set(CMAKE_CXX_ARCHIVE_CREATE "<CMAKE_AR> ar qc <TARGET> <LINK_FLAGS> <OBJECTS>")
set(CMAKE_CXX_ARCHIVE_APPEND "<CMAKE_AR> ar q <TARGET> <LINK_FLAGS> <OBJECTS>")
set(CMAKE_CXX_ARCHIVE_FINISH "<CMAKE_AR> ranlib <TARGET>")
# Debugging information comes unasked, and that of the C++ library inside is seven times the size of
# the rest.
set(CMAKE_CXX_FLAGS_INIT "-g0")
set(CMAKE_SHARED_LINKER_FLAGS_INIT "-s")
