// From the tensors of a node to a Task, and on to the kernel.
//
// Letters: d features, r rank, a adapters, b entries of the index, t rows of X for each entry.

#include <algorithm>
#include <new>
#include <string>
#include <thread>

#ifdef __linux__
#include <sched.h>
#endif

#include "cpu_packing.h"
#include "cpu_reflection.h"
#include "operator.h"
#ifdef HRA_CUDA
#include "cuda_reflection.h"
#endif

namespace hra::ort {
namespace {

// What one call reads and writes of the runtime; members of the group in the order of the operator.
struct Tensor {
  const int64_t* shape = nullptr;
  size_t rank = 0;
  const void* data = nullptr;
};

OrtStatus* ReadTensor(const OrtApi* api, const OrtValue* value, Tensor* tensor) {
  ONNXTensorElementDataType type;
  OrtStatus* status = GetTensorShape::Call(api, value, &type, &tensor->shape, &tensor->rank);
  return status == nullptr ? GetTensorData::Call(api, value, &tensor->data) : status;
}

// Where ParallelFor finds the runtime's threads.
struct Pool {
  const OrtApi* api;
  const OrtKernelContext* context;
};

// The cores that this process may use: a guess at the size of the session's pool, which the interface does not tell.
int Cores() {
  static const int cores = [] {
#ifdef __linux__
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0) return CPU_COUNT(&allowed);
#endif
    return static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
  }();
  return cores;
}

void RunParallel(const Parallel& self, void (*work)(void*, size_t), size_t n, void* data) {
  const auto* pool = static_cast<const Pool*>(self.pool);
  OrtStatus* status = KernelParallelFor::Call(pool->api, pool->context, work, n, 0, data);
  if (status == nullptr) return;
  // It fails before anything ran: a runtime without this service.
  ReleaseStatus::Call(pool->api, status);
  for (size_t i = 0; i < n; ++i) work(data, i);
}

std::string Text(const int64_t* shape, size_t rank) {
  std::string text = "(";
  for (size_t i = 0; i < rank; ++i) text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return text + (rank == 1 ? ",)" : ")");
}

// One call: reads, checks, allocates, runs. Every step returns null or a status; the first that fails is the answer.
class Call {
 public:
  Call(const Kernel& kernel, OrtKernelContext* context)
      : kernel_(kernel), op_(kernel.op), api_(kernel.op.api), context_(context) {}

  OrtStatus* Run() {
    OrtStatus* status = ReadX();
    if (status == nullptr && op_.has_rows) status = ReadIndex();
    // Packed factors are complete, and what describes them in the runtime is not touched: it is far from every cache.
    packed_ = kernel_.packed.features == task_.features && task_.rows <= cpu::kFewRows ? &kernel_.packed : nullptr;
    for (size_t i = 0; i < op_.members && status == nullptr; ++i) {
      status = packed_ == nullptr ? ReadMember(i)
                                  : MakeMember(i, {nullptr, nullptr, nullptr, packed_->members[i].rank, 1});
    }
    return status == nullptr ? Launch() : status;
  }

 private:
  OrtStatus* Read(size_t input, Tensor* tensor) const {
    const OrtValue* value = nullptr;
    OrtStatus* status = KernelGetInput::Call(api_, context_, input, &value);
    return status == nullptr ? ReadTensor(api_, value, tensor) : status;
  }

  OrtStatus* ReadX() {
    if (OrtStatus* status = Read(0, &x_)) return status;
    if (op_.has_rows ? x_.rank != 3 : x_.rank == 0) {
      return Refuse("X", op_.has_rows ? "(b, t, d)" : "(..., d)", x_);
    }
    task_.type = op_.type;
    task_.x = x_.data;
    task_.features = x_.shape[x_.rank - 1];
    task_.rows = 1;
    for (size_t i = 0; i + 1 < x_.rank; ++i) task_.rows *= x_.shape[i];
    task_.index = nullptr;
    task_.rows_per_index = task_.rows;
    return nullptr;
  }

  OrtStatus* ReadIndex() {
    Tensor index;
    if (OrtStatus* status = Read(1, &index)) return status;
    if (index.rank != 1 || index.shape[0] != x_.shape[0]) {
      return Refuse("A", "(" + std::to_string(x_.shape[0]) + ",)", index);
    }
    task_.index = static_cast<const int64_t*>(index.data);
    task_.rows_per_index = x_.shape[1];
    return nullptr;
  }

  OrtStatus* ReadMember(size_t i) {
    Tensor u, v;
    const size_t first = op_.FirstU() + 2 * i;
    OrtStatus* status = Read(first, &u);
    if (status == nullptr) status = Read(first + 1, &v);
    if (status == nullptr) status = CheckShapes(i, u, v);
    if (status != nullptr) return status;
    return MakeMember(i, {u.data, v.data, nullptr, u.shape[u.rank - 1], op_.has_rows ? u.shape[0] : 1});
  }

  // Adds a member with its Y.
  OrtStatus* MakeMember(size_t i, Member member) {
    OrtValue* value = nullptr;
    OrtStatus* status = KernelGetOutput::Call(api_, context_, i, x_.shape, x_.rank, &value);
    if (status == nullptr && value == nullptr) return Fail("an output is left out");
    if (status == nullptr) status = GetTensorMutableData::Call(api_, value, &member.y);
    members_[i] = member;
    return status;
  }

  OrtStatus* CheckShapes(size_t i, const Tensor& u, const Tensor& v) const {
    const std::string number = op_.members == 1 ? "" : "_" + std::to_string(i + 1);
    const std::string d = std::to_string(task_.features), stacked = op_.has_rows ? "a, " : "";
    const size_t rank = op_.has_rows ? 3 : 2;
    if (u.rank != rank || u.shape[rank - 2] != task_.features) {
      return Refuse("U" + number, "(" + stacked + d + ", r)", u);
    }
    const int64_t* wanted = u.shape;
    const bool fits = v.rank == rank && v.shape[rank - 2] == wanted[rank - 1] && v.shape[rank - 1] == task_.features &&
                      (!op_.has_rows || v.shape[0] == wanted[0]);
    const std::string adapters = op_.has_rows ? std::to_string(wanted[0]) + ", " : "";
    return fits ? nullptr : Refuse("V" + number, "(" + adapters + std::to_string(wanted[rank - 1]) + ", " + d + ")", v);
  }

  OrtStatus* Launch() {
    if (task_.rows == 0 || task_.features == 0) return nullptr;
    task_.members = members_.data();
    task_.count = static_cast<int64_t>(op_.members);
    if (op_.provider == Provider::kCpu) {
      Pool pool{api_, context_};
      return Fail(ReflectOnCpu(task_, Parallel{RunParallel, &pool, Cores()}, packed_));
    }
#ifdef HRA_CUDA
    void* stream = nullptr;
    if (OrtStatus* status = KernelGetStream::Call(api_, context_, &stream)) return status;
    return Fail(ReflectOnCuda(task_, stream));
#else
    return Fail("built without CUDA");
#endif
  }

  OrtStatus* Refuse(const std::string& input, const std::string& expected, const Tensor& got) const {
    const std::string text = std::string(op_.name.data()) + ": input " + input + ": expected shape " + expected +
                             ", got " + Text(got.shape, got.rank);
    return CreateStatus::Call(api_, ORT_INVALID_ARGUMENT, text.c_str());
  }

  OrtStatus* Fail(const char* reason) const {
    if (reason == nullptr) return nullptr;
    const std::string text = std::string(op_.name.data()) + ": " + reason;
    return CreateStatus::Call(api_, ORT_FAIL, text.c_str());
  }

  const Kernel& kernel_;
  const Operator& op_;
  const OrtApi* const api_;
  OrtKernelContext* const context_;
  Tensor x_;
  Task task_{};
  std::array<Member, kMaxMembers> members_;
  const cpu::PackedFactors* packed_ = nullptr;
};

}  // namespace

OrtStatus* PackFactors(const OrtKernelInfo* info, Kernel* kernel) {
  const Operator& op = kernel->op;
  if (op.provider != Provider::kCpu || op.has_rows) return nullptr;
  std::array<Member, kMaxMembers> members{};
  int64_t d = -1;
  for (size_t i = 0; i < 2 * op.members; ++i) {
    const OrtValue* value = nullptr;
    int is_constant = 0;
    OrtStatus* status = KernelGetConstantInput::Call(op.api, info, op.FirstU() + i, &is_constant, &value);
    if (status == nullptr && is_constant == 0) return nullptr;  // it is fed, and may be another in every run
    Tensor tensor;
    if (status == nullptr) status = ReadTensor(op.api, value, &tensor);
    if (status != nullptr) return status;
    if (tensor.rank != 2) return nullptr;  // `Compute` says what is wrong
    Member& member = members[i / 2];
    const bool is_u = i % 2 == 0;
    if (is_u) member.rank = tensor.shape[1];
    (is_u ? member.u : member.v) = tensor.data;
    if (i == 0) d = tensor.shape[0];
    if (tensor.shape[is_u ? 0 : 1] != d || tensor.shape[is_u ? 1 : 0] != member.rank) return nullptr;
  }
  Task task{};
  task.type = op.type;
  task.features = d;
  task.members = members.data();
  task.count = static_cast<int64_t>(op.members);
  try {
    const cpu::Packing packing(task);
    const int64_t bytes = packing.Bytes();
    void* to = bytes == 0 ? nullptr : kernel->memory.Reserve(static_cast<size_t>(bytes));
    if (to != nullptr) kernel->packed = packing.To(to);
  } catch (const std::bad_alloc&) {  // they are read where they are
  }
  return nullptr;
}

OrtStatus* Compute(const Kernel& kernel, OrtKernelContext* context) {
  try {
    return Call(kernel, context).Run();
  } catch (const std::exception& error) {  // no memory for a text or for a kernel's scratch
    return CreateStatus::Call(kernel.op.api, ORT_FAIL, error.what());
  }
}

}  // namespace hra::ort
