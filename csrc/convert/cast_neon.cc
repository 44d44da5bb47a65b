// What every CPU of aarch64 has, with its own conversions of fp16.
#define WL_CAST_ISA neon
#define WL_CAST_NEON
#include "convert/cast_loops.inl"
