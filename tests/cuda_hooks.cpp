// Linked into the tests' build of csrc/ops_cuda.cpp: tells the simulator which memory the kernels may touch.
//
// The build wraps torch's data_ptr functions, so that whatever tensor's address the host code asks for is known here, and
// stands in for the stream, which a torch without CUDA does not have. An operator asks for its stream first of all.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <map>
#include <vector>

namespace {
std::map<char*, int64_t> touched;    // storages: where and how many bytes
std::vector<AtenTensorHandle> kept;  // a second reference to each, since the simulator copies them in and back

void touch(AtenTensorHandle tensor, const void* data) {
  int64_t bytes = 0, offset = 0;
  int32_t type = 0;
  if (!data || aoti_torch_get_storage_size(tensor, &bytes) || aoti_torch_get_storage_offset(tensor, &offset) ||
      aoti_torch_get_dtype(tensor, &type))
    return;
  if (bytes == 0) return;
  AtenTensorHandle again;
  if (aoti_torch_new_tensor_handle(tensor, &again)) return;
  kept.push_back(again);
  touched[static_cast<char*>(const_cast<void*>(data)) - offset * int64_t(aoti_torch_dtype_element_size(type))] = bytes;
}
}  // namespace

extern "C" {
AOTITorchError __real_torch_get_const_data_ptr(AtenTensorHandle, const void**);
AOTITorchError __real_torch_get_mutable_data_ptr(AtenTensorHandle, void**);
AOTITorchError __wrap_torch_get_const_data_ptr(AtenTensorHandle tensor, const void** data) {
  const AOTITorchError error = __real_torch_get_const_data_ptr(tensor, data);
  if (!error) touch(tensor, *data);
  return error;
}
AOTITorchError __wrap_torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** data) {
  const AOTITorchError error = __real_torch_get_mutable_data_ptr(tensor, data);
  if (!error) touch(tensor, *data);
  return error;
}
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  touched.clear();
  for (AtenTensorHandle tensor : kept) aoti_torch_delete_tensor_object(tensor);
  kept.clear();
  *stream = nullptr;
  return 0;
}

// The i-th storage that the operator under way has asked for, or 0 bytes.
int64_t fsl_touched(int64_t i, char** data) {
  for (const auto& [at, bytes] : touched)
    if (i-- == 0) {
      *data = at;
      return bytes;
    }
  return 0;
}
}
