// What every CPU of the architecture runs: SSE2 on x86-64, NEON on aarch64.
#define WL_CAST_ISA baseline
#include "convert/cast_loops.inl"
