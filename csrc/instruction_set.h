// Compiles the rest of a source for x86 with AVX512 if DWRL_FAST_AVX512 is defined, otherwise with AVX2. Include it after everything that
// is not at::vec, so that no inline function shared with other sources needs either, and before the kernels.

#ifdef DWRL_FAST_AVX512
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#define CPU_CAPABILITY AVX512
#define CPU_CAPABILITY_AVX512
#define ROW_PASS_NAMESPACE avx512
// GCC 12 warns about the undefined upper halves in its own intrinsics.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#else
#pragma GCC target("avx2,fma,f16c")
#define CPU_CAPABILITY AVX2
#define CPU_CAPABILITY_AVX2
#define ROW_PASS_NAMESPACE avx2
#endif

// Before version 13, g++ does not define these macros at the pragma, but at::vec needs them.
#ifndef __AVX__
#define __AVX__ 1
#endif
#ifndef __AVX2__
#define __AVX2__ 1
#endif
#ifndef __FMA__
#define __FMA__ 1
#endif
#ifdef DWRL_FAST_AVX512
#ifndef __AVX512F__
#define __AVX512F__ 1
#endif
#ifndef __AVX512BW__
#define __AVX512BW__ 1
#endif
#ifndef __AVX512VL__
#define __AVX512VL__ 1
#endif
#ifndef __AVX512DQ__
#define __AVX512DQ__ 1
#endif
#endif
