// The CUDA kernels of the reflection operators: what they take and promise. How they work: cuda_reflection.cu.
#pragma once

#include "task.h"

namespace hra {

// Queues Y_i = X + (X U_i) V_i for every member on the stream, and returns at once.
//
// Every pointer of the task is to device memory, the index too; only the list of members is read here. Nothing is
// allocated, nothing waits, and no device memory is read on the host: a call can be recorded in a CUDA graph. It is
// one launch (one for every 8 members). Sums are float32, in an order that depends on shapes alone; Y is rounded once.
// A row whose index names no adapter becomes NaN in Y; nothing outside the tensors is read.
//
// stream: a cudaStream_t. Returns null, or what went wrong as a text that lives as long as the process.
const char* ReflectOnCuda(const Task& task, void* stream);

}  // namespace hra
