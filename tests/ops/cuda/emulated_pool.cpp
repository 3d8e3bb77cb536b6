// Max pooling for the emulator.
#include "pool.cuh"
