// What every CPU of the architecture runs.
#define WL_CAST_ISA baseline
#include "convert/cast_loops.inl"
