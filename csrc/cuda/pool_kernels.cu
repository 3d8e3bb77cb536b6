// Max pooling in every storage type.
#include "pool.cuh"
