// The few macros: what runs on host and device, and what the op library shows to others.
#pragma once

#ifdef __CUDACC__
#define FLEXTRON_HD __host__ __device__ inline
#else
#define FLEXTRON_HD inline
#endif

#define FLEXTRON_API __attribute__((visibility("default")))
