#define WL_CAST_ISA avx512
#include "convert/cast_loops.inl"
