// The operators of domain `hra`, version 1, for ONNX Runtime: the table of them and their registration.
//
// The runtime merges operators of one name into one whose inputs take any of their types, and picks the kernel by type
// and provider. A registered name shadows the function of that name in a model for every type, so each operator comes
// in all three.

#include <cstdio>
#include <exception>
#include <initializer_list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "cpu_instructions.h"
#include "operator.h"
#ifdef HRA_CUDA
#include "cuda_reflection.h"
#endif

#ifdef _WIN32
#define HRA_EXPORT extern "C" __declspec(dllexport)
#else
#define HRA_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace hra::ort {
namespace {

constexpr const char* kDomain = "hra";

const Operator& Of(const OrtCustomOp* op) { return *static_cast<const Operator*>(op); }

ONNXTensorElementDataType ElementType(Type type) {
  switch (type) {
    case Type::kFloat16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    case Type::kBFloat16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
    default: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
}

OrtStatus* ORT_API_CALL CreateKernel(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info, void** made) {
  try {
    auto kernel = std::make_unique<Kernel>(Kernel{Of(op), {}});
    if (OrtStatus* status = PackFactors(info, kernel.get())) return status;
    *made = kernel.release();
    return nullptr;
  } catch (const std::exception& error) {
    return CreateStatus::Call(api, ORT_FAIL, error.what());
  }
}

// Whether an inferred shape is known well enough to be passed on: a missing shape arrives as that of a scalar, and a
// size without name as −1.
bool IsKnown(const OrtApi* api, const OrtTensorTypeAndShapeInfo* info) {
  size_t rank = 0;
  OrtStatus* status = GetDimensionsCount::Call(api, info, &rank);
  if (status != nullptr || rank == 0) return ReleaseStatus::Call(api, status), false;
  std::vector<int64_t> sizes(rank);
  std::vector<const char*> symbols(rank);
  status = GetDimensions::Call(api, info, sizes.data(), rank);
  if (status == nullptr) status = GetSymbolicDimensions::Call(api, info, symbols.data(), rank);
  if (status != nullptr) return ReleaseStatus::Call(api, status), false;
  for (size_t i = 0; i < rank; ++i) {
    if (sizes[i] < 0 && symbols[i][0] == '\0') return false;
  }
  return true;
}

// Y has the shape of X. What cannot be said is left unsaid; the runtime drops a status that comes from here.
OrtStatus* ORT_API_CALL InferShapes(const OrtCustomOp* op, OrtShapeInferContext* context) {
  const OrtApi* api = Of(op).api;
  OrtTensorTypeAndShapeInfo* x = nullptr;  // it belongs to the context
  OrtStatus* status = InferGetInput::Call(api, context, 0, &x);
  if (status == nullptr && !IsKnown(api, x)) return nullptr;
  for (size_t i = 0; i < Of(op).members && status == nullptr; ++i) {
    status = InferSetOutput::Call(api, context, i, x);
  }
  if (status != nullptr) ReleaseStatus::Call(api, status);
  return nullptr;
}

Operator MakeOperator(const OrtApi* api, size_t members, bool has_rows, Type type, Provider provider) {
  Operator op{};
  op.version = kApiVersion;
  op.api = api;
  op.type = type;
  op.provider = provider;
  op.members = members;
  op.has_rows = has_rows;
  std::string name = has_rows ? "HouseholderReflectionRows" : "HouseholderReflection";
  if (members > 1) name += "Group" + std::to_string(members);
  std::snprintf(op.name.data(), op.name.size(), "%s", name.c_str());

  op.GetName = [](const OrtCustomOp* self) -> const char* { return Of(self).name.data(); };
  op.GetExecutionProviderType = [](const OrtCustomOp* self) -> const char* {
    return Of(self).provider == Provider::kCuda ? "CUDAExecutionProvider" : "CPUExecutionProvider";
  };
  op.GetInputTypeCount = [](const OrtCustomOp* self) -> size_t { return Of(self).Inputs(); };
  op.GetInputType = [](const OrtCustomOp* self, size_t i) {
    return Of(self).has_rows && i == 1 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : ElementType(Of(self).type);
  };
  op.GetOutputTypeCount = [](const OrtCustomOp* self) -> size_t { return Of(self).members; };
  op.GetOutputType = [](const OrtCustomOp* self, size_t) { return ElementType(Of(self).type); };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
  op.GetStartVersion = [](const OrtCustomOp*) { return kOperatorVersion; };
  op.GetEndVersion = [](const OrtCustomOp*) { return kOperatorVersion; };
  op.CreateKernelV2 = CreateKernel;
  op.KernelComputeV2 = [](void* self, OrtKernelContext* context) -> OrtStatus* {
    return Compute(*static_cast<const Kernel*>(self), context);
  };
  op.KernelDestroy = [](void* self) { delete static_cast<Kernel*>(self); };
  op.InferOutputShapeFn = InferShapes;
  return op;
}

// Every operator in every type, for every provider that this library has kernels for.
std::vector<Operator> MakeOperators(const OrtApi* api) {
  std::vector<Provider> providers{Provider::kCpu};
#ifdef HRA_CUDA
  providers.push_back(Provider::kCuda);
#endif
  std::vector<Operator> made;
  for (Provider provider : providers) {
    for (bool has_rows : {false, true}) {
      for (size_t members = 1; members <= kMaxMembers; ++members) {
        for (Type type : {Type::kFloat32, Type::kFloat16, Type::kBFloat16}) {
          made.push_back(MakeOperator(api, members, has_rows, type, provider));
        }
      }
    }
  }
  return made;
}

OrtStatus* Fill(const OrtApi* api, OrtCustomOpDomain* domain, const std::vector<Operator>& operators) {
  for (const Operator& op : operators) {
    if (OrtStatus* status = CustomOpDomainAdd::Call(api, domain, &op)) return status;
  }
  return nullptr;
}

// The domain of a runtime, made once and never released: session options keep a pointer to it for as long as they
// live, and sessions one to the operators.
OrtStatus* DomainOf(const OrtApi* api, OrtCustomOpDomain** domain) {
  static auto* lock = new std::mutex;
  static auto* domains = new std::map<const OrtApi*, std::pair<OrtCustomOpDomain*, std::vector<Operator>>>;
  const std::lock_guard<std::mutex> guard(*lock);
  const auto found = domains->find(api);
  if (found != domains->end()) return *domain = found->second.first, nullptr;
  auto operators = MakeOperators(api);
  if (OrtStatus* status = CreateCustomOpDomain::Call(api, kDomain, domain)) return status;
  if (OrtStatus* status = Fill(api, *domain, operators)) {
    ReleaseCustomOpDomain::Call(api, *domain);
    return status;
  }
  // A vector that is moved keeps its elements where they are.
  domains->emplace(api, std::make_pair(*domain, std::move(operators)));
  return nullptr;
}

#ifdef HRA_CUDA
// The architectures of the build as JSON strings.
std::string Text(const std::initializer_list<const char*>& names) {
  std::string text;
  for (const char* name : names) text += (text.empty() ? "\"" : ", \"") + std::string(name) + "\"";
  return text;
}
#endif

// The error of a runtime that is too old for the slots used; those of API 1 are in every runtime.
OrtStatus* TooOld(const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(1);
  if (api == nullptr) return nullptr;
  const std::string text = "the operators of hra-export need ONNX Runtime 1." + std::to_string(kApiVersion) +
                           " or later, this is " + base->GetVersionString();
  return CreateStatus::Call(api, ORT_NOT_IMPLEMENTED, text.c_str());
}

}  // namespace
}  // namespace hra::ort

// The entry point that ONNX Runtime calls when session options are given the library.
HRA_EXPORT OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  using namespace hra::ort;
  const OrtApi* api = base->GetApi(kApiVersion);
  if (api == nullptr) return TooOld(base);
  try {
    OrtCustomOpDomain* domain = nullptr;
    if (OrtStatus* status = DomainOf(api, &domain)) return status;
    return AddCustomOpDomain::Call(api, options, domain);
  } catch (const std::exception& error) {
    return CreateStatus::Call(api, ORT_FAIL, error.what());
  }
}

// What this library is, as a JSON object; the text lives as long as the library.
HRA_EXPORT const char* HraExportOperatorInfo() {
  static const std::string* text = new std::string(
      std::string(R"({"version": ")") + HRA_EXPORT_VERSION + R"(", "operators": )" +
      std::to_string(hra::ort::kOperatorVersion) +
#ifdef HRA_CUDA
      R"(, "providers": ["cpu", "cuda"], "cuda_architectures": [)" + hra::ort::Text({HRA_CUDA_ARCHITECTURES}) + "]" +
#else
      R"(, "providers": ["cpu"], "cuda_architectures": [])" +
#endif
      R"(, "instructions": ")" + hra::cpu::BestInstructions().name + R"("})");
  return text->c_str();
}

#ifdef HRA_CUDA
// The CUDA kernel without a runtime around it; pointers of the task are on the device, members in host memory.
HRA_EXPORT const char* HraExportReflectOnCuda(const hra::Task* task, void* stream) {
  return hra::ReflectOnCuda(*task, stream);
}
#endif
