// What the kernels ask of the device, one function each: where a thread is, barriers, exchange between threads and
// between the blocks of a cluster, number formats, the tensor cores, and the launch.
//
// Everything that is CUDA's own and not C++ stands here, so that the kernels can run on another machine model: a
// program that defines HRA_CUDA_DEVICE_CUH and these names before it includes the kernels brings its own.
// Clusters need compute capability 9.0; their functions trap below it, and the launch never asks for them there.
#ifndef HRA_CUDA_DEVICE_CUH
#define HRA_CUDA_DEVICE_CUH

#include <cuda_runtime.h>

#include <cstdint>

namespace hra {

// float16 and bfloat16 as bits: the kernels move them about, and compute in float32.
struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

namespace device {

// One launch: blocks in two directions; `cluster` neighbours along x form a cluster (1: no clusters).
struct Shape {
  unsigned blocks_x;
  unsigned blocks_y;
  unsigned cluster;
  unsigned threads;
  unsigned shared_bytes;
};

struct Properties {
  int compute_major;
  int multiprocessors;
  int shared_limit;  // bytes of shared memory that a block may ask for
};

__device__ __forceinline__ int Thread() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ unsigned BlockX() { return blockIdx.x; }
__device__ __forceinline__ unsigned BlockY() { return blockIdx.y; }
__device__ __forceinline__ unsigned BlocksY() { return gridDim.y; }

__device__ __forceinline__ char* Shared() {
  extern __shared__ __align__(16) char shared[];
  return shared;
}

__device__ __forceinline__ void SyncBlock() { __syncthreads(); }

// Arrive and wait are one barrier of the cluster in two halves; memory written before the first half is seen after
// the second.
__device__ __forceinline__ void ArriveCluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");
#else
  __trap();
#endif
}

__device__ __forceinline__ void WaitCluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#else
  __trap();
#endif
}

// The same place in the shared memory of block `rank` of this cluster.
template <class T>
__device__ __forceinline__ T* Peer(T* mine, int rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t theirs;
  asm("mapa.u64 %0, %1, %2;" : "=l"(theirs) : "l"(reinterpret_cast<uint64_t>(mine)), "r"(rank));
  return reinterpret_cast<T*>(theirs);
#else
  __trap();
  return mine;
#endif
}

__device__ __forceinline__ float ShuffleXor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

__device__ __forceinline__ void Prefetch(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

__device__ __forceinline__ float ToFloat(float value) { return value; }

__device__ __forceinline__ float ToFloat(Half value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}

__device__ __forceinline__ float ToFloat(BFloat16 value) {
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}

// Round to nearest even; NaN stays NaN.
template <class T>
__device__ __forceinline__ T FromFloat(float value);

template <>
__device__ __forceinline__ float FromFloat<float>(float value) {
  return value;
}

template <>
__device__ __forceinline__ Half FromFloat<Half>(float value) {
  Half result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
}

template <>
__device__ __forceinline__ BFloat16 FromFloat<BFloat16>(float value) {
  BFloat16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
}

// c += A B on the tensor cores, A (16, 16), B (16, 8), c (16, 8) float32. With g = lane / 4 and t = lane % 4 a lane
// holds a: rows g, g + 8, g, g + 8 at columns 2t, 2t, 2t + 8, 2t + 8 and the next; b: column g at rows 2t and 2t + 8
// and the next; c: row g at columns 2t and 2t + 1, then row g + 8. Source: PTX ISA, mma.m16n8k16.
// Volatile: all lanes of a warp take part, so it must not move to where only some of them use the result.
template <class T>
__device__ __forceinline__ void Mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void Mma<Half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void Mma<BFloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// What the current device offers, or why that is not known. A build without code for 9.0 has no clusters on a newer
// device either, which then compiles the older PTX: so the architecture is that of the code, for which `kernel` stands.
template <class Problem>
const char* Query(void (*kernel)(Problem), Properties& found) {
  static thread_local int known_device = -1;
  static thread_local Properties known = {};
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess && device == known_device) {
    found = known;
    return nullptr;
  }
  const auto read = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, device);
  };
  read(found.compute_major, cudaDevAttrComputeCapabilityMajor);
  read(found.multiprocessors, cudaDevAttrMultiProcessorCount);
  read(found.shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  cudaFuncAttributes code = {};
  if (error == cudaSuccess && found.compute_major >= 9) {
    error = cudaFuncGetAttributes(&code, kernel);
    if (code.ptxVersion / 10 < found.compute_major) found.compute_major = code.ptxVersion / 10;
  }
  if (error != cudaSuccess) return cudaGetErrorString(error);
  known_device = device;
  known = found;
  return nullptr;
}

template <class Problem>
const char* Launch(void (*kernel)(Problem), const Shape& shape, const Problem& problem, const Properties& properties,
                   void* stream) {
  constexpr unsigned kWithoutAsking = 48 * 1024;
  cudaError_t error = cudaSuccess;
  // Always the whole limit: another thread's launch of this kernel may need more than this one.
  if (shape.shared_bytes > kWithoutAsking)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, properties.shared_limit);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = shape.cluster;
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(shape.blocks_x, shape.blocks_y);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  error = cudaLaunchKernelEx(&config, kernel, problem);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace device
}  // namespace hra

#endif  // HRA_CUDA_DEVICE_CUH
