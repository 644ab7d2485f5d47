# The GNU compiler for $board; the soft-float interface, so that no floating point can be used unseen.
set(CMAKE_SYSTEM_NAME Generic)
set(CMAKE_SYSTEM_PROCESSOR $cpu)
set(CMAKE_C_COMPILER $gcc)
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
set(machine $machine)
add_compile_options($${machine})
add_link_options($${machine})
# The stack of the plan is for -O2.
set(CMAKE_C_FLAGS_RELEASE "-O2" CACHE STRING "Options of a release")
