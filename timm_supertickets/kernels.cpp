#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

namespace {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t STEP = Vec::size();
constexpr int WIDE = 4;  // registers of sums

struct Range {
  float start, low, high;
};

template <int N, typename Source>
inline void tile(float* to, int64_t p, int64_t taps, const float* weights, const Range& range, const Source& source) {
  Vec sum[N];
  for (int i = 0; i < N; ++i) sum[i] = Vec(range.start);
  for (int64_t t = 0; t < taps; ++t) {
    const Vec weight(weights[t]);
    const float* from = source(t) + p;
    for (int i = 0; i < N; ++i) sum[i] = at::vec::fmadd(weight, Vec::loadu(from + i * STEP), sum[i]);
  }
  const Vec low(range.low), high(range.high);
  for (int i = 0; i < N; ++i) at::vec::clamp(sum[i], low, high).store(to + p + i * STEP);
}

// to[p] = start + the sum over t of weights[t] * source(t)[p], within low and high, for p in [0, count)
template <typename Source>
inline void gather(float* to, int64_t count, int64_t taps, const float* weights, Range range, const Source& source) {
  int64_t p = 0;
  for (; p + WIDE * STEP <= count; p += WIDE * STEP) tile<WIDE>(to, p, taps, weights, range, source);
  for (; p + STEP <= count; p += STEP) tile<1>(to, p, taps, weights, range, source);
  for (; p < count; ++p) {
    float sum = range.start;
    for (int64_t t = 0; t < taps; ++t) sum += weights[t] * source(t)[p];
    to[p] = std::clamp(sum, range.low, range.high);
  }
}

at::Tensor pointwise(const at::Tensor& images, const at::Tensor& rows, const at::Tensor& columns,
                     const at::Tensor& values, const at::Tensor& bias, int64_t in_channels, double low, double high) {
  TORCH_CHECK(images.dim() == 4 && images.size(1) == in_channels, "expected images of ", in_channels, " channels, got ",
              images.sizes());
  const auto x = images.contiguous();
  const int64_t channels = x.size(1), outs = rows.numel() - 1, pixels = x.size(2) * x.size(3);
  auto y = at::empty({x.size(0), outs, x.size(2), x.size(3)}, x.options());
  const float* all = x.const_data_ptr<float>();
  float* made = y.mutable_data_ptr<float>();
  const int64_t *row = rows.const_data_ptr<int64_t>(), *column = columns.const_data_ptr<int64_t>();
  const float *value = values.const_data_ptr<float>(), *shift = bias.const_data_ptr<float>();
  const int64_t piece = WIDE * STEP, pieces = (pixels + piece - 1) / piece;
  at::parallel_for(0, x.size(0) * pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job) {
      const int64_t first = job % pieces * piece, count = std::min(piece, pixels - first);
      const float* source = all + job / pieces * channels * pixels + first;
      float* target = made + job / pieces * outs * pixels + first;
      for (int64_t out = 0; out < outs; ++out) {
        const int64_t* from = column + row[out];
        gather(target + out * pixels, count, row[out + 1] - row[out], value + row[out],
               Range{shift[out], float(low), float(high)},
               [=](int64_t t) { return source + from[t] * pixels; });
      }
    }
  });
  return y;
}

at::Tensor depthwise(const at::Tensor& images, const at::Tensor& weight, const at::Tensor& bias, int64_t stride,
                     int64_t padding, int64_t dilation, double low, double high) {
  TORCH_CHECK(images.dim() == 4 && images.size(1) == weight.size(0), "expected images of ", weight.size(0),
              " channels, got ", images.sizes());
  const auto x = images.contiguous();
  const int64_t channels = x.size(1), height = x.size(2), width = x.size(3), side = weight.size(2);
  const int64_t around = 2 * padding - dilation * (side - 1) - 1;
  TORCH_CHECK(height + around >= 0 && width + around >= 0, "images of ", height, "x", width,
              " are smaller than the kernel");
  const int64_t rows = (height + around) / stride + 1, cols = (width + around) / stride + 1;
  // The padded map, cut into stride x stride maps of every stride-th pixel: in those every tap is a shift.
  const int64_t tall = (height + 2 * padding + stride - 1) / stride, wide = (width + 2 * padding + stride - 1) / stride;
  const int64_t map = tall * wide, flat = (rows - 1) * wide + cols, rounded = (flat + STEP - 1) / STEP * STEP;
  auto y = at::empty({x.size(0), channels, rows, cols}, x.options());
  const float* all = x.const_data_ptr<float>();
  float* made = y.mutable_data_ptr<float>();
  const float *taps = weight.const_data_ptr<float>(), *shift = bias.const_data_ptr<float>();
  std::vector<int64_t> offsets;
  for (int64_t r = 0; r < side * dilation; r += dilation)
    for (int64_t c = 0; c < side * dilation; c += dilation)
      offsets.push_back((r % stride * stride + c % stride) * map + r / stride * wide + c / stride);
  at::parallel_for(0, x.size(0) * channels, 4, [&](int64_t begin, int64_t end) {
    std::vector<float> padded(stride * stride * map + STEP, 0.0f), sums(rounded), living(side * side);
    std::vector<const float*> sources(side * side);
    for (int64_t plane = begin; plane < end; ++plane) {
      for (int64_t i = 0; i < height; ++i) {
        const float* line = all + (plane * height + i) * width;
        float* to = padded.data() + (i + padding) % stride * stride * map + (i + padding) / stride * wide;
        if (stride == 1) {
          std::copy_n(line, width, to + padding);
          continue;
        }
        for (int64_t start = 0; start < stride; ++start) {  // every stride-th pixel from here on
          float* every = to + (start + padding) % stride * map + (start + padding) / stride;
          for (int64_t j = start; j < width; j += stride) *every++ = line[j];
        }
      }
      const float* tap = taps + plane % channels * side * side;
      int64_t count = 0;
      for (size_t k = 0; k < offsets.size(); ++k) {
        sources[count] = padded.data() + offsets[k];
        living[count] = tap[k];
        count += tap[k] != 0;
      }
      const float* const* from = sources.data();
      gather(sums.data(), rounded, count, living.data(),
             Range{shift[plane % channels], float(low), float(high)}, [=](int64_t t) { return from[t]; });
      for (int64_t i = 0; i < rows; ++i) std::copy_n(sums.data() + i * wide, cols, made + (plane * rows + i) * cols);
    }
  });
  return y;
}

}  // namespace

TORCH_LIBRARY(timm_supertickets, m) {
  m.def("pointwise(Tensor images, Tensor rows, Tensor columns, Tensor values, Tensor bias, int in_channels, "
        "float low, float high) -> Tensor",
        pointwise);
  m.def("depthwise(Tensor images, Tensor weight, Tensor bias, int stride, int padding, int dilation, float low, float high)"
        " -> Tensor",
        depthwise);
}
