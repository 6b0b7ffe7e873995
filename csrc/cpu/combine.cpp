#include <algorithm>

#include "cpu/device.h"
#include "cpu/rows.h"

namespace mapsurgery {
namespace {

constexpr int64_t kTile = 512;  // columns combined at a time; a row of the tile stays in the first-level cache
constexpr int64_t kRows = 16;   // rows that share a tile of the right factor
constexpr int64_t kGrain = 1 << 15;

// A strided matrix whose rows are read and written as acc_t.
template <class acc_t>
class Matrix {
 public:
  explicit Matrix(const Tensor& t)
      : data_(static_cast<char*>(t.data_ptr())),
        element_(static_cast<int64_t>(t.element_size())),
        row_stride_(t.stride(0)),
        column_stride_(t.stride(1)) {
    dispatch_floating(t.scalar_type(), [&](auto type) {
      using T = typename decltype(type)::type;
      load_ = [](acc_t* dst, const void* src, int64_t stride, int64_t n) {
        load_row(dst, static_cast<const T*>(src), stride, n);
      };
      store_ = [](void* dst, int64_t stride, const acc_t* src, int64_t n) {
        store_row(static_cast<T*>(dst), stride, src, n);
      };
    });
  }

  void load(acc_t* dst, int64_t row, int64_t column, int64_t n) const {
    load_(dst, at(row, column), column_stride_, n);
  }
  void store(const acc_t* src, int64_t row, int64_t column, int64_t n) const {
    store_(at(row, column), column_stride_, src, n);
  }

 private:
  char* at(int64_t row, int64_t column) const {
    return data_ + (row * row_stride_ + column * column_stride_) * element_;
  }

  char* data_;
  int64_t element_, row_stride_, column_stride_;
  void (*load_)(acc_t*, const void*, int64_t, int64_t);
  void (*store_)(void*, int64_t, const acc_t*, int64_t);
};

// out = base_factor weight + update_factor left right; left (m, r) of any strides, right (r, K) contiguous.
template <class acc_t>
void combine_tiles(const Tensor& weight, const Tensor& left, const Tensor& right, acc_t base_factor,
                   acc_t update_factor, const Tensor& out) {
  const int64_t m = weight.size(0), K = weight.size(1), rank = right.size(0);
  if (m == 0 || K == 0) return;
  const Matrix<acc_t> from(weight), into(out), factors(left);
  const acc_t* rows = static_cast<const acc_t*>(right.data_ptr());
  const int64_t row_blocks = (m + kRows - 1) / kRows, tiles = (K + kTile - 1) / kTile;
  const int64_t work = kRows * std::min(kTile, K) * (rank + 4);
  torch::stable::parallel_for(0, row_blocks * tiles, std::max<int64_t>(1, kGrain / work),
                              [&](int64_t begin, int64_t end) {
                                std::vector<acc_t> coefficients(rank);
                                acc_t row[kTile];
                                for (int64_t block = begin; block < end; ++block) {
                                  const int64_t first = block / tiles * kRows, column = block % tiles * kTile;
                                  const int64_t n = std::min(kTile, K - column);
                                  for (int64_t i = first; i < std::min(m, first + kRows); ++i) {
                                    from.load(row, i, column, n);
                                    factors.load(coefficients.data(), i, 0, rank);
                                    affine_row(coefficients.data(), update_factor, acc_t(0), rank);
                                    affine_row(row, base_factor, acc_t(0), n);
                                    add_rows(row, coefficients.data(), 1, rows + column, K, rank, n);
                                    into.store(row, i, column, n);
                                  }
                                }
                              });
}

// out = base weight + update BA, in the dtype that both accumulate in.
void combine_any(const Tensor& weight, const Tensor& A, const Tensor& B, double base, double update,
                 const Tensor& out) {
  // Rows are walked along the smaller stride: the transpose of W' is the same with the factors' roles swapped.
  if (is_column_major(weight)) {
    return combine_any(transposed(weight), transposed(B), transposed(A), base, update, transposed(out));
  }
  const ScalarType acc = accumulate_dtype(weight.scalar_type(), A.scalar_type());
  dispatch_accumulate(acc, [&](auto type) {
    using acc_t = typename decltype(type)::type;
    combine_tiles<acc_t>(weight, B, as_contiguous(cast(A, acc)), static_cast<acc_t>(base), static_cast<acc_t>(update),
                         out);
  });
}

}  // namespace

void Cpu::combine(const Tensor& weight, const Tensor& A, const Tensor& B, const Tensor& s_w, const Tensor& s_d,
                  Combine mode, const Tensor& out) {
  const double w = read(&s_w), d = read(&s_d);
  combine_any(weight, A, B, mode == Combine::kMerge ? w : 1 / w, mode == Combine::kMerge ? d : -d / w, out);
}

Tensor Cpu::scaled(const Tensor& t, const Tensor& scale, ScalarType dtype) {
  const ScalarType acc = accumulate_dtype(t.scalar_type());
  Tensor out = empty(sizes_of(t), dtype, t);
  combine_any(t, empty({0, t.size(1)}, acc, t), empty({t.size(0), 0}, acc, t), read(&scale), 0, out);
  return out;
}

}  // namespace mapsurgery
