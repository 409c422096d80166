// The gradient of the weights of depthwise convolutions on a CPU, for which oneDNN takes several times as long as for
// the convolution itself. Loaded into a process, it serves every such convolution that autograd meets there.

#include <ATen/ATen.h>
#include <ATen/CompositeExplicitAutogradFunctions.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <vector>

namespace {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t STEP = Vec::size();
constexpr int WIDE = 2;  // registers beside each other: so many channels are summed at a time
constexpr int64_t BLOCK = WIDE * STEP;
constexpr int64_t SMALL = 16;  // pixels up to which 3x3 kernels are served as well; on larger maps oneDNN is as fast
std::atomic<bool> used{true};

struct Shape {
  int64_t images, channels, height, width, rows, cols, stride, top, left;
};

// One row of taps: sums[k] += the sum over a map of gradient[p] * padded[p moved by k].
template <int SIDE>
inline void taps_of_row(float* sums, const float* padded, const float* gradient, const Shape& shape, int64_t row) {
  const int64_t across = shape.width + 2 * shape.left;
  Vec sum[SIDE * WIDE];
  for (int i = 0; i < SIDE * WIDE; ++i) sum[i] = Vec::loadu(sums + i * STEP);
  for (int64_t y = 0; y < shape.rows; ++y) {
    const int64_t from = y * shape.stride + row - shape.top;
    if (from < 0 || from >= shape.height) continue;
    const float* line = padded + from * across * BLOCK;
    const float* grad = gradient + y * shape.cols * BLOCK;
    for (int64_t x = 0; x < shape.cols; ++x, grad += BLOCK, line += shape.stride * BLOCK) {
      for (int w = 0; w < WIDE; ++w) {
        const Vec g = Vec::loadu(grad + w * STEP);
        for (int k = 0; k < SIDE; ++k)
          sum[k * WIDE + w] = at::vec::fmadd(g, Vec::loadu(line + k * BLOCK + w * STEP), sum[k * WIDE + w]);
      }
    }
  }
  for (int i = 0; i < SIDE * WIDE; ++i) sum[i].store(sums + i * STEP);
}

// Maps whose channels lie beside each other, `pitch` floats from pixel to pixel: slices of channels-last maps too.
struct Maps {
  const float* first;
  int64_t pitch;
};

// Those of a tensor, which is copied if its channels do not lie so. Strides of sides of one say nothing, hence the last.
Maps maps(at::Tensor& t) {
  const int64_t pitch = t.stride(3);
  const bool fits = t.stride(1) == 1 && t.stride(2) == t.size(3) * pitch && t.stride(0) == t.size(2) * t.stride(2);
  if (fits && pitch >= t.size(1)) return {t.const_data_ptr<float>(), pitch};
  t = t.contiguous(at::MemoryFormat::ChannelsLast);
  return {t.const_data_ptr<float>(), t.size(1)};
}

// Channels [first, first + count) of a map, beside `left` columns of zeros on both sides.
inline void pack(float* to, const Maps& from, int64_t n, int64_t rows, int64_t cols, int64_t left, int64_t first,
                 int64_t count) {
  const float* pixel = from.first + n * rows * cols * from.pitch + first;
  for (int64_t y = 0; y < rows; ++y, to += 2 * left * BLOCK) {
    for (int64_t x = 0; x < cols; ++x, to += BLOCK, pixel += from.pitch) std::copy_n(pixel, count, to + left * BLOCK);
  }
}

template <int SIDE>
void weight_gradient(float* made, const Maps& images, const Maps& gradients, const Shape& shape) {
  const int64_t blocks = (shape.channels + BLOCK - 1) / BLOCK;
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    // what is not written stays zero: the sides, and lanes past the last channel
    std::vector<float> padded((shape.height * (shape.width + 2 * shape.left)) * BLOCK);
    std::vector<float> gradient(shape.rows * shape.cols * BLOCK), sums(SIDE * SIDE * BLOCK);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * BLOCK, count = std::min(BLOCK, shape.channels - first);
      if (count < BLOCK) {
        std::fill(padded.begin(), padded.end(), 0.0f);
        std::fill(gradient.begin(), gradient.end(), 0.0f);
      }
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (int64_t n = 0; n < shape.images; ++n) {
        pack(padded.data(), images, n, shape.height, shape.width, shape.left, first, count);
        pack(gradient.data(), gradients, n, shape.rows, shape.cols, 0, first, count);
        for (int64_t row = 0; row < SIDE; ++row)
          taps_of_row<SIDE>(sums.data() + row * SIDE * BLOCK, padded.data(), gradient.data(), shape, row);
      }
      for (int64_t lane = 0; lane < count; ++lane)
        for (int64_t tap = 0; tap < SIDE * SIDE; ++tap)
          made[(first + lane) * SIDE * SIDE + tap] = sums[tap * BLOCK + lane];
    }
  });
}

bool ours(const at::Tensor& gradient, const at::Tensor& images, const at::Tensor& weight, at::IntArrayRef dilation,
          bool transposed, int64_t groups) {
  const auto plain = [](const at::Tensor& t) { return t.dim() == 4 && t.scalar_type() == at::kFloat && t.is_cpu(); };
  if (transposed || !plain(gradient) || !plain(images) || !plain(weight)) return false;
  const int64_t side = weight.size(2);
  return groups == images.size(1) && groups == weight.size(0) && groups > 1 && side == weight.size(3) &&
         (side == 5 || side == 7 || (side == 3 && images.size(2) * images.size(3) <= SMALL)) && images.numel() > 0 &&
         std::all_of(dilation.begin(), dilation.end(), [](int64_t d) { return d == 1; });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& gradient, const at::Tensor& images, const at::Tensor& weight, at::OptionalIntArrayRef bias_sizes,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
    at::IntArrayRef output_padding, int64_t groups, std::array<bool, 3> wanted) {
  const bool here = used && wanted[1] && ours(gradient, images, weight, dilation, transposed, groups) &&
                    (stride.size() == 1 || stride[0] == stride[1]);
  if (here) wanted[1] = false;
  std::tuple<at::Tensor, at::Tensor, at::Tensor> grads;
  if (wanted[0] || wanted[1] || wanted[2])
    grads = at::compositeexplicitautograd::convolution_backward(gradient, images, weight, bias_sizes, stride, padding,
                                                                dilation, transposed, output_padding, groups, wanted);
  if (here) {
    auto x = images, g = gradient;
    const Maps from = maps(x), towards = maps(g);
    auto made = at::empty(weight.sizes(), weight.options());
    const Shape shape{x.size(0), x.size(1), x.size(2), x.size(3),      g.size(2),
                      g.size(3), stride[0], padding[0], padding.back()};
    const int64_t side = weight.size(2);
    const auto run = side == 3 ? weight_gradient<3> : side == 5 ? weight_gradient<5> : weight_gradient<7>;
    run(made.mutable_data_ptr<float>(), from, towards, shape);
    std::get<1>(grads) = made;
  }
  return grads;
}

}  // namespace

TORCH_LIBRARY(timm_supertickets_gradients, m) {
  m.def("use(bool on) -> ()", [](bool on) { used = on; });  // to measure what they give, in one process
}

TORCH_LIBRARY_IMPL(aten, CPU, m) { m.impl("convolution_backward", convolution_backward); }
