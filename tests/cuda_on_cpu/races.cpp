// Calls the operators with each thread of a block one of the operating system, for the race sanitizer.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <cstdio>
#include <optional>
#include <random>
#include <string>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

Tensor random_tensor(const Sizes& sizes, ScalarType dtype) {
  static std::mt19937 random(1);
  std::normal_distribution<float> normal;
  Sizes strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * sizes[i];
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                               aoti_torch_device_type_cpu(), 0, &handle));
  Tensor result(handle);
  for (int64_t i = 0; i < result.numel(); ++i) {
    if (dtype == ScalarType::Float) {
      static_cast<float*>(result.data_ptr())[i] = normal(random);
    } else {
      static_cast<torch::headeronly::BFloat16*>(result.data_ptr())[i] = normal(random);
    }
  }
  return result;
}

// The results of an operator that returns so many tensors.
template <size_t results, class... Arguments>
std::vector<Tensor> call(const std::string& name, const Arguments&... arguments) {
  std::vector<StableIValue> stack{torch::stable::detail::from(arguments)...};
  stack.resize(std::max(stack.size(), results));
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(("mapsurgery::" + name).c_str(), "", stack.data(), TORCH_ABI_VERSION));
  std::vector<Tensor> tensors;
  for (size_t i = 0; i < results; ++i) tensors.push_back(torch::stable::detail::to<Tensor>(stack[i]));
  return tensors;
}

void run(ScalarType dtype, int64_t rank) {
  constexpr int64_t kRows = 40, kColumns = 72, kBatch = 20;
  const Tensor A = random_tensor({rank, kColumns}, ScalarType::Float);
  const Tensor B = random_tensor({kRows, rank}, ScalarType::Float), one = random_tensor({1}, ScalarType::Float);
  const Tensor weight = random_tensor({kRows, kColumns}, dtype);
  const auto bias = std::optional<Tensor>(random_tensor({kRows}, dtype)), none = std::optional<Tensor>();
  const double tau = 0.1;

  const auto scales = call<5>("map_scales", A, B, one, one, one, tau, true);
  const Tensor &s_w = scales[0], &s_d = scales[1];
  const std::vector<Tensor> norm(scales.begin() + 2, scales.end());
  call<4>("map_scales_backward", s_w, s_d, A, B, norm[0], norm[1], norm[2]);

  const Tensor x = random_tensor({kBatch, kColumns}, dtype);
  for (const auto& b : {bias, none}) {
    const auto out = call<2>("lowrank_linear", x, weight, b, A, B, s_w, s_d);
    for (const auto& through : {norm, std::vector<Tensor>()}) {
      call<7>("lowrank_linear_backward", out[0], x, out[1], weight, A, B, s_w, s_d, through, true, true, true, true,
              true);
    }
  }

  call<0>("merge_", weight, A, B, s_w, s_d);
  call<0>("unmerge_", weight, A, B, s_w, s_d);

  if (rank > 3) return;  // convolutions launch the same kernels, and threads are slow
  const Tensor images = random_tensor({2, 8, 5, 6}, dtype), kernel = random_tensor({kRows, 8, 3, 3}, dtype);
  const Sizes ones{1, 1};
  for (const bool weight_space : {false, true}) {
    const auto out =
        call<2>("lowrank_conv", images, kernel, bias, A, B, s_w, s_d, ones, ones, ones, int64_t(1), weight_space);
    call<7>("lowrank_conv_backward", out[0], images, out[1], kernel, A, B, s_w, s_d, norm, ones, ones, ones, int64_t(1),
            weight_space, true, true, true, true, true);
  }
}

}  // namespace

int main() {
  run(ScalarType::Float, 3);
  run(ScalarType::Float, 33);
  run(ScalarType::BFloat16, 16);
  std::puts("no races");
}
