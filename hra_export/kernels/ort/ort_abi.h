// The few parts of ONNX Runtime's C interface that the operators need.
//
// Without ORT_INCLUDE_DIR these are declarations of our own: no package registry carries the runtime's headers. The
// interface only ever grows at its end: `OrtApi` is a table of function pointers, and a slot keeps its place and its
// type for ever. A slot is read only after `GetApi(kApiVersion)` has said that the runtime has it.
//
// With ORT_INCLUDE_DIR (HRA_ORT_HEADERS is defined then) the runtime's own header is used, and every place and value
// written here is checked against it when compiling.
//
// Source: the public header `onnxruntime_c_api.h` of ONNX Runtime 1.24 and later.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef HRA_ORT_HEADERS
#include <onnxruntime_c_api.h>
#elif defined(_WIN32)
#define ORT_API_CALL __stdcall
#else
#define ORT_API_CALL
#endif

#ifndef HRA_ORT_HEADERS
extern "C" {

struct OrtApi;
struct OrtCustomOpDomain;
struct OrtKernelContext;
struct OrtKernelInfo;
struct OrtSessionOptions;
struct OrtShapeInferContext;
struct OrtStatus;
struct OrtTensorTypeAndShapeInfo;
struct OrtValue;

struct OrtApiBase {
  const OrtApi*(ORT_API_CALL* GetApi)(uint32_t version) noexcept;
  const char*(ORT_API_CALL* GetVersionString)() noexcept;
};

enum OrtErrorCode { ORT_OK = 0, ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2, ORT_NOT_IMPLEMENTED = 9 };

enum ONNXTensorElementDataType {
  ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED = 0,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT = 1,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 = 7,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 = 10,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16 = 16,
};

enum OrtCustomOpInputOutputCharacteristic { INPUT_OUTPUT_REQUIRED = 0 };

enum OrtMemType { OrtMemTypeDefault = 0 };

// An operator's description. Members past `version` are read only by runtimes that know them; all of these are known
// since API 18.
struct OrtCustomOp {
  uint32_t version;
  void*(ORT_API_CALL* CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char*(ORT_API_CALL* GetName)(const OrtCustomOp*);
  const char*(ORT_API_CALL* GetExecutionProviderType)(const OrtCustomOp*);
  ONNXTensorElementDataType(ORT_API_CALL* GetInputType)(const OrtCustomOp*, size_t index);
  size_t(ORT_API_CALL* GetInputTypeCount)(const OrtCustomOp*);
  ONNXTensorElementDataType(ORT_API_CALL* GetOutputType)(const OrtCustomOp*, size_t index);
  size_t(ORT_API_CALL* GetOutputTypeCount)(const OrtCustomOp*);
  void(ORT_API_CALL* KernelCompute)(void* kernel, OrtKernelContext*);
  void(ORT_API_CALL* KernelDestroy)(void* kernel);
  OrtCustomOpInputOutputCharacteristic(ORT_API_CALL* GetInputCharacteristic)(const OrtCustomOp*, size_t index);
  OrtCustomOpInputOutputCharacteristic(ORT_API_CALL* GetOutputCharacteristic)(const OrtCustomOp*, size_t index);
  OrtMemType(ORT_API_CALL* GetInputMemoryType)(const OrtCustomOp*, size_t index);
  int(ORT_API_CALL* GetVariadicInputMinArity)(const OrtCustomOp*);
  int(ORT_API_CALL* GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int(ORT_API_CALL* GetVariadicOutputMinArity)(const OrtCustomOp*);
  int(ORT_API_CALL* GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus*(ORT_API_CALL* CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void** kernel);
  OrtStatus*(ORT_API_CALL* KernelComputeV2)(void* kernel, OrtKernelContext*);
  OrtStatus*(ORT_API_CALL* InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
  int(ORT_API_CALL* GetStartVersion)(const OrtCustomOp*);
  int(ORT_API_CALL* GetEndVersion)(const OrtCustomOp*);
  size_t(ORT_API_CALL* GetMayInplace)(int** inputs, int** outputs);
  void(ORT_API_CALL* ReleaseMayInplace)(int* inputs, int* outputs);
  size_t(ORT_API_CALL* GetAliasMap)(int** inputs, int** outputs);
  void(ORT_API_CALL* ReleaseAliasMap)(int* inputs, int* outputs);
};

}  // extern "C"
#endif

namespace hra::ort {

// The newest slot below came with ONNX Runtime 1.24.
constexpr uint32_t kApiVersion = 24;

// A slot of `OrtApi`: its place and its type.
template <size_t place, typename Function>
struct Slot;

template <size_t place, typename Result, typename... Arguments>
struct Slot<place, Result(Arguments...)> {
  using Pointer = Result(ORT_API_CALL*)(Arguments...);
  static constexpr size_t kPlace = place;

  static Result Call(const OrtApi* api, Arguments... arguments) {
    return reinterpret_cast<const Pointer*>(api)[place](arguments...);
  }
};

using CreateStatus = Slot<0, OrtStatus*(OrtErrorCode, const char*)>;                       // API 1
using CreateCustomOpDomain = Slot<26, OrtStatus*(const char*, OrtCustomOpDomain**)>;       // API 1
using CustomOpDomainAdd = Slot<27, OrtStatus*(OrtCustomOpDomain*, const OrtCustomOp*)>;    // API 1
using AddCustomOpDomain = Slot<28, OrtStatus*(OrtSessionOptions*, OrtCustomOpDomain*)>;    // API 1
using GetTensorMutableData = Slot<51, OrtStatus*(OrtValue*, void**)>;                      // API 1
using KernelGetInput = Slot<90, OrtStatus*(const OrtKernelContext*, size_t, const OrtValue**)>;  // API 1
using KernelGetOutput =
    Slot<91, OrtStatus*(OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**)>;   // API 1
using ReleaseStatus = Slot<93, void(OrtStatus*)>;                                          // API 1
using ReleaseCustomOpDomain = Slot<101, void(OrtCustomOpDomain*)>;                         // API 1
using GetDimensionsCount = Slot<61, OrtStatus*(const OrtTensorTypeAndShapeInfo*, size_t*)>;  // API 1
using GetDimensions = Slot<62, OrtStatus*(const OrtTensorTypeAndShapeInfo*, int64_t*, size_t)>;  // API 1
using GetSymbolicDimensions = Slot<63, OrtStatus*(const OrtTensorTypeAndShapeInfo*, const char**, size_t)>;  // API 1
using KernelGetStream = Slot<193, OrtStatus*(const OrtKernelContext*, void**)>;            // API 10
using KernelGetConstantInput =
    Slot<249, OrtStatus*(const OrtKernelInfo*, size_t, int*, const OrtValue**)>;           // API 15
using InferGetInput =
    Slot<268, OrtStatus*(const OrtShapeInferContext*, size_t, OrtTensorTypeAndShapeInfo**)>;  // API 17
using InferSetOutput =
    Slot<270, OrtStatus*(const OrtShapeInferContext*, size_t, const OrtTensorTypeAndShapeInfo*)>;  // API 17
using KernelParallelFor =
    Slot<274, OrtStatus*(const OrtKernelContext*, void (*)(void*, size_t), size_t, size_t, void*)>;  // API 17
using GetTensorData = Slot<378, OrtStatus*(const OrtValue*, const void**)>;                // API 23
using GetTensorShape =
    Slot<414, OrtStatus*(const OrtValue*, ONNXTensorElementDataType*, const int64_t**, size_t*)>;  // API 24

#ifdef HRA_ORT_HEADERS
#define HRA_CHECK_SLOT(slot, name)                                                                   \
  static_assert(slot::kPlace * sizeof(void*) == offsetof(OrtApi, name), #name " has another place"); \
  static_assert(sizeof(static_cast<slot::Pointer>(OrtApi{}.name)) == sizeof(void*))
HRA_CHECK_SLOT(CreateStatus, CreateStatus);
HRA_CHECK_SLOT(CreateCustomOpDomain, CreateCustomOpDomain);
HRA_CHECK_SLOT(CustomOpDomainAdd, CustomOpDomain_Add);
HRA_CHECK_SLOT(AddCustomOpDomain, AddCustomOpDomain);
HRA_CHECK_SLOT(GetTensorMutableData, GetTensorMutableData);
HRA_CHECK_SLOT(KernelGetInput, KernelContext_GetInput);
HRA_CHECK_SLOT(KernelGetOutput, KernelContext_GetOutput);
HRA_CHECK_SLOT(ReleaseStatus, ReleaseStatus);
HRA_CHECK_SLOT(ReleaseCustomOpDomain, ReleaseCustomOpDomain);
HRA_CHECK_SLOT(GetDimensionsCount, GetDimensionsCount);
HRA_CHECK_SLOT(GetDimensions, GetDimensions);
HRA_CHECK_SLOT(GetSymbolicDimensions, GetSymbolicDimensions);
HRA_CHECK_SLOT(KernelGetStream, KernelContext_GetGPUComputeStream);
HRA_CHECK_SLOT(KernelGetConstantInput, KernelInfoGetConstantInput_tensor);
HRA_CHECK_SLOT(InferGetInput, ShapeInferContext_GetInputTypeShape);
HRA_CHECK_SLOT(InferSetOutput, ShapeInferContext_SetOutputTypeShape);
HRA_CHECK_SLOT(KernelParallelFor, KernelContext_ParallelFor);
HRA_CHECK_SLOT(GetTensorData, GetTensorData);
HRA_CHECK_SLOT(GetTensorShape, GetTensorElementTypeAndShapeDataReference);
#undef HRA_CHECK_SLOT
#endif

}  // namespace hra::ort
