// metagpt_fast._cuda: devices, memory, streams, events, and the launches of kernels.cu, as plain functions of numbers:
// metagpt_fast/backends/cuda_device.py makes them a device. Links the static CUDA runtime, which finds the driver at
// run time, so the module loads on machines without one.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../bindings/gil_release.h"
#include "kernels.h"

namespace py = pybind11;
using namespace metagpt_fast;

namespace {

using Address = std::uint64_t;  // of memory, a stream or an event

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // so that the next launch does not report it again
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

void* pointer(Address address) { return reinterpret_cast<void*>(address); }
Address address_of(const void* p) { return reinterpret_cast<Address>(p); }
cudaStream_t stream_of(Address address) { return reinterpret_cast<cudaStream_t>(address); }
cudaEvent_t event_of(Address address) { return reinterpret_cast<cudaEvent_t>(address); }

int driver_version() {
  int version = 0;  // stays 0 where there is no driver
  check(cudaDriverGetVersion(&version), "cudaDriverGetVersion");
  return version;
}

// One dict per device: name, compute capability, memory. Raises RuntimeError with CUDA's own reason if there is no
// driver, or none that this runtime can use.
py::list devices() {
  // cudaGetDeviceCount reports a missing driver as one that is too old.
  if (driver_version() == 0) throw std::runtime_error("no NVIDIA driver was found");
  int count = 0;
  check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  py::list found;
  for (int index = 0; index < count; ++index) {
    cudaDeviceProp properties{};
    check(cudaGetDeviceProperties(&properties, index), "cudaGetDeviceProperties");
    py::dict device;
    device["index"] = index;
    device["name"] = std::string(properties.name);
    device["compute_capability"] = std::to_string(properties.major) + "." + std::to_string(properties.minor);
    device["memory_nbytes"] = properties.totalGlobalMem;
    found.append(device);
  }
  return found;
}

int runtime_version() {
  int version = 0;
  check(cudaRuntimeGetVersion(&version), "cudaRuntimeGetVersion");
  return version;
}

void define_memory(py::module_& m) {
  m.def("set_device", [](int index) { check(cudaSetDevice(index), "cudaSetDevice"); });
  m.def("allocate", [](std::size_t nbytes) {
    void* p = nullptr;
    check(cudaMalloc(&p, nbytes), "cudaMalloc");
    return address_of(p);
  });
  m.def("free", [](Address address) { check(cudaFree(pointer(address)), "cudaFree"); });
  m.def("allocate_pinned", [](std::size_t nbytes) {
    void* p = nullptr;
    const GilRelease release;  // touches every page
    check(cudaHostAlloc(&p, nbytes, cudaHostAllocDefault), "cudaHostAlloc");
    return address_of(p);
  });
  m.def("free_pinned", [](Address address) { check(cudaFreeHost(pointer(address)), "cudaFreeHost"); });
  // Between any two of device memory and pinned memory.
  m.def("copy_async", [](Address to, Address from, std::size_t nbytes, Address stream) {
    check(cudaMemcpyAsync(pointer(to), pointer(from), nbytes, cudaMemcpyDefault, stream_of(stream)), "cudaMemcpyAsync");
  });
}

void define_streams(py::module_& m) {
  m.def("make_stream", [] {
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
    return address_of(stream);
  });
  m.def("destroy_stream", [](Address stream) { check(cudaStreamDestroy(stream_of(stream)), "cudaStreamDestroy"); });
  // A thread that waits for one sleeps, and leaves its core to the threads that read and write.
  m.def("make_event", [](bool is_timed) {
    cudaEvent_t event = nullptr;
    const unsigned flags = cudaEventBlockingSync | (is_timed ? 0u : cudaEventDisableTiming);
    check(cudaEventCreateWithFlags(&event, flags), "cudaEventCreate");
    return address_of(event);
  });
  m.def("destroy_event", [](Address event) { check(cudaEventDestroy(event_of(event)), "cudaEventDestroy"); });
  m.def("record", [](Address event, Address stream) {
    check(cudaEventRecord(event_of(event), stream_of(stream)), "cudaEventRecord");
  });
  m.def("wait", [](Address stream, Address event) {
    check(cudaStreamWaitEvent(stream_of(stream), event_of(event), 0), "cudaStreamWaitEvent");
  });
  m.def("synchronize", [](Address event) {
    const GilRelease release;
    check(cudaEventSynchronize(event_of(event)), "cudaEventSynchronize");
  });
  m.def("seconds_between", [](Address first, Address second) {
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, event_of(first), event_of(second)), "cudaEventElapsedTime");
    return milliseconds / 1e3;
  });
  m.def("drain", [] {
    const GilRelease release;
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  });
}

void define_launches(py::module_& m) {
  m.def("layer_gram",
        [](Address table, std::int64_t num_tensors, int num_operands, bool has_base, std::int64_t num_blocks,
           std::int64_t num_spans, unsigned kinds, Address scratch, Address gram, Address stream) {
          cuda::run_layer_gram(cuda::layer_table_at(table, num_tensors, num_operands, has_base), num_blocks, num_spans,
                               kinds, static_cast<double*>(pointer(scratch)), static_cast<double*>(pointer(gram)),
                               stream_of(stream));
        });
  m.def("layer_merge", [](Address table, std::int64_t num_tensors, int num_operands, bool has_base,
                          std::int64_t num_blocks, unsigned kinds, Address num_nonfinite, Address stream) {
    cuda::run_layer_merge(cuda::layer_table_at(table, num_tensors, num_operands, has_base), num_blocks, kinds,
                          static_cast<unsigned long long*>(pointer(num_nonfinite)), stream_of(stream));
  });
}

// Sparse layers have a base: their tables are those of layers with one.
void define_sparse_launches(py::module_& m) {
  m.def("count_keys", [](Address table, std::int64_t num_tensors, int num_operands, std::int64_t num_blocks, int count,
                         Address wanted, int key_kind, int num_keys, int num_ranks, Address counts, Address stream) {
    cuda::run_count_keys(cuda::layer_table_at(table, num_tensors, num_operands, true), num_blocks, count,
                         cuda::wanted_keys_at(wanted, num_tensors, key_kind, num_keys, num_ranks),
                         static_cast<unsigned long long*>(pointer(counts)), stream_of(stream));
  });
  m.def("layer_moments",
        [](Address table, std::int64_t num_tensors, int num_operands, std::int64_t num_blocks, std::int64_t num_spans,
           Address masks, int key_kind, Address scratch, Address moments, Address stream) {
          cuda::run_layer_moments(cuda::layer_table_at(table, num_tensors, num_operands, true),
                                  cuda::mask_columns_at(masks, num_tensors, num_operands - 1, key_kind), num_blocks,
                                  num_spans, static_cast<double*>(pointer(scratch)),
                                  static_cast<double*>(pointer(moments)), stream_of(stream));
        });
  m.def("layer_elect", [](Address table, std::int64_t num_tensors, int num_operands, std::int64_t num_blocks,
                          Address masks, int key_kind, Address election, Address num_nonfinite, Address stream) {
    cuda::run_layer_elect(cuda::layer_table_at(table, num_tensors, num_operands, true),
                          cuda::mask_columns_at(masks, num_tensors, num_operands - 1, key_kind),
                          cuda::election_columns_at(election, num_tensors, num_operands - 1), num_blocks,
                          static_cast<unsigned long long*>(pointer(num_nonfinite)), stream_of(stream));
  });
  m.def("ranked_masks", [](Address table, std::int64_t num_tensors, int num_operands, std::int64_t num_blocks,
                           Address masks, int key_kind, Address ranks, std::int64_t num_rows, std::int64_t num_items,
                           Address scratch, Address stream) {
    cuda::run_ranked_masks(cuda::layer_table_at(table, num_tensors, num_operands, true),
                           cuda::mask_columns_at(masks, num_tensors, num_operands - 1, key_kind),
                           cuda::rank_columns_at(ranks, num_tensors), num_blocks, num_rows, num_items, pointer(scratch),
                           stream_of(stream));
  });
}

void define_column_launches(py::module_& m) {
  m.def("column_gram", [](Address table, std::int64_t num_tensors, int num_operands, bool has_base, Address matrices,
                          std::int64_t num_sums, Address gram, Address open_sums, Address stream) {
    cuda::run_column_gram(cuda::layer_table_at(table, num_tensors, num_operands, has_base), matrices, num_sums,
                          static_cast<double*>(pointer(gram)), static_cast<double*>(pointer(open_sums)),
                          stream_of(stream));
  });
  m.def("column_merge", [](Address table, std::int64_t num_tensors, int num_operands, bool has_base, Address matrices,
                           std::int64_t num_blocks, Address coefficients, Address num_nonfinite, Address stream) {
    cuda::run_column_merge(cuda::layer_table_at(table, num_tensors, num_operands, has_base), matrices, num_blocks,
                           static_cast<const double*>(pointer(coefficients)),
                           static_cast<unsigned long long*>(pointer(num_nonfinite)), stream_of(stream));
  });
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA devices and kernels. metagpt_fast/backends/cuda_device.py documents and wraps them.";
  m.def("devices", &devices);
  m.def("driver_version", &driver_version);
  m.def("runtime_version", &runtime_version);
  define_memory(m);
  define_streams(m);
  define_launches(m);
  define_sparse_launches(m);
  define_column_launches(m);
}
