// Batch norm for the emulator.
#include "norm.cuh"
