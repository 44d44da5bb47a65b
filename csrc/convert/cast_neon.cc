// aarch64's vector instructions, including their fp16 conversions.
#define WL_CAST_ISA neon
#define WL_CAST_NEON
#include "convert/cast_loops.inl"
