// The optimizer steps for the emulator.
#include "update.cuh"
