// Batch norm in every storage type.
#include "norm.cuh"
