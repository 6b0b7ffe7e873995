// Every kernel once or twice, each of its threads one of the operating system: for the race sanitizer.
#include <cstdio>
#include <random>

#include "cuda/device.h"

namespace mapsurgery {
namespace {

Tensor random_tensor(const Sizes& sizes, ScalarType dtype) {
  static std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const Sizes strides = contiguous_strides(sizes);
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                               aoti_torch_device_type_cpu(), 0, &handle));
  Tensor result(handle);
  dispatch_floating(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    T* numbers = static_cast<T*>(result.data_ptr());
    for (int64_t i = 0; i < result.numel(); ++i) numbers[i] = static_cast<T>(normal(random));
  });
  return result;
}

void run(ScalarType dtype, int64_t rank) {
  const ScalarType acc = accumulate_dtype(dtype);
  const Tensor one = random_tensor({1}, acc);
  const Tensor A = random_tensor({rank, 300}, dtype), B = transposed(random_tensor({rank, 200}, dtype));
  const Tensor scales = std::get<0>(Cuda::map_scales(A, B, one, one, one, 0.1, true));

  const Tensor weight = random_tensor({40, 70}, dtype), flipped = transposed(random_tensor({70, 40}, dtype));
  const Tensor right = random_tensor({rank, 70}, acc), left = random_tensor({40, rank}, acc);
  Cuda::combine(weight, right, left, scales, Combine::kMerge, weight);
  Cuda::combine(flipped, right, left, scales, Combine::kUnmerge, flipped);

  Tensor a = random_tensor({3000}, dtype), b = random_tensor({3000}, dtype), c = random_tensor({3000}, dtype);
  Cuda::dot(a, b, scales, DS_W);
  Cuda::dot_and_combine_(a, b, c, scales, DS_W);
  Cuda::scale_(a, {scales, S_W});
  Cuda::tangent(random_tensor({rank, 70}, dtype), random_tensor({rank, rank}, acc), right, one, scales, dtype);

  Tensor rows = random_tensor({37, 130}, dtype), channels = random_tensor({2, 5, 150}, dtype);
  Cuda::scale_and_bias_(rows, {scales, S_W}, random_tensor({130}, dtype), 1);
  Cuda::scale_and_bias_(channels, {scales, S_W}, random_tensor({5}, dtype), 150);
}

}  // namespace
}  // namespace mapsurgery

int main() {
  using mapsurgery::ScalarType;
  for (const ScalarType dtype : {ScalarType::Float, ScalarType::BFloat16}) {
    for (const int64_t rank : {3, 33}) mapsurgery::run(dtype, rank);
  }
  std::puts("no races");
}
