#define WL_CAST_ISA avx2
#include "convert/cast_loops.inl"
