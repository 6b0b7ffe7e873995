// A GPU that runs kernels on the CPU, one block after another, and checks what a real one would leave to chance.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulated {

struct Thread {
  dim3 index, block, of_block, of_grid;  // threadIdx, blockIdx, blockDim, gridDim
};

// The thread that runs. With EMULATOR_THREADS each is a thread of the operating system, as the race sanitizer needs;
// otherwise all of a block are fibers of the one that launches.
#ifdef EMULATOR_THREADS
extern thread_local const Thread* current;
#else
extern const Thread* current;
#endif

// __syncthreads().
void barrier(const char* file, int line);

// Runs the kernel, `body` in each thread. Throws what is wrong with the launch or with a barrier.
void run(const std::string& kernel, size_t parameter_bytes, dim3 grid, dim3 block, const std::function<void()>& body);

// Adds a launch to those that emulated_launches() tells.
void count(const std::string& name);

// An operation of torch, which may use the handle of cuBLAS that the library borrowed: throws if it was not restored.
void torch_operation(const std::string& name);
void check_blas_handle();

// The name of a function, without namespaces and template arguments.
template <auto function>
std::string name_of() {
  std::string_view text = __PRETTY_FUNCTION__;
  text.remove_prefix(text.find("function = ") + std::string_view("function = ").size());
  text = text.substr(0, text.find_first_of("<;]"));
  return std::string(text.substr(text.rfind(':') + 1));
}

// A function of torch's C shim that counts as a launch.
template <auto function, class Type = decltype(function)>
struct Counted;
template <auto function, class... Parameters>
struct Counted<function, AOTITorchError (*)(Parameters...)> {
  static AOTITorchError call(Parameters... parameters) {
    static const std::string name = name_of<function>();
    torch_operation(name);
    return function(parameters...);
  }
};

// In place of functions of torch; a fresh tensor holds NaN.
AOTITorchError empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                             int32_t device_type, int32_t device_index, AtenTensorHandle* result);
AOTITorchError call_dispatcher(const char* name, const char* overload, StableIValue* stack, uint64_t version);
AOTITorchError current_stream(int32_t device_index, void** stream);
AOTITorchError blas_handle(void** handle);

}  // namespace emulated
