// Optimizer steps in float32 and float64.
#include "update.cuh"
