# Arm's compiler for $board; the soft-float interface, so that no floating point can be used unseen.
set(CMAKE_SYSTEM_NAME Generic)
set(CMAKE_SYSTEM_PROCESSOR $cpu)
set(CMAKE_C_COMPILER arm-none-eabi-gcc)
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
set(CMAKE_C_FLAGS_INIT "-mcpu=$cpu -mthumb -mfloat-abi=soft")
# -O2 is what the stack of the plan was measured with.
set(CMAKE_C_FLAGS_RELEASE_INIT "-O2")
