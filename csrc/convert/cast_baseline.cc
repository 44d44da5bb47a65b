// For every CPU of the architecture.
#define WL_CAST_ISA baseline
#include "convert/cast_loops.inl"
