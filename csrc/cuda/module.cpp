// metagpt_fast._cuda: what the CUDA driver of this machine says. Links the static CUDA runtime, which finds the driver
// at run time, so the module loads on machines without one.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace {

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// One dict per device: name, compute capability, memory. Raises RuntimeError with CUDA's own reason if there is no
// driver, or none that this runtime can use.
py::list devices() {
  int driver_version = 0;  // stays 0 where there is no driver, which cudaGetDeviceCount reports as a driver too old
  check(cudaDriverGetVersion(&driver_version), "cudaDriverGetVersion");
  if (driver_version == 0) throw std::runtime_error("no NVIDIA driver was found");
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

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA devices of this machine, for `metagpt-fast info`.";
  m.def("devices", &devices);
  m.def("runtime_version", &runtime_version);
}
