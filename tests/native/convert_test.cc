// Every cast against a reference that shares nothing with the code under test: it lists a format's
// numbers, finds the two neighbours of an input and compares it with their exact midpoint.

#include <elf.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <set>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "convert/cast.h"
#include "convert/scatter.h"

// The kernel's source as plain C++, one thread after the other (it has no barriers). This tests its
// arithmetic of blocks, words, heads and tails without a GPU.
#define __global__
#define __device__
#define __launch_bounds__(threads)
struct Coordinates {
  std::uint32_t x;
};
static Coordinates threadIdx;
static Coordinates blockIdx;
struct alignas(16) uint4 {
  std::uint32_t x, y, z, w;
};
#include "convert/scatter.cu"

namespace weightlift::convert {
namespace {

constexpr std::array kFormats = {FloatFormat::kF64, FloatFormat::kF32,    FloatFormat::kBf16,
                                 FloatFormat::kF16, FloatFormat::kF8E4M3, FloatFormat::kF8E5M2};

const char* name_of(FloatFormat format) {
  constexpr std::array kNames = {"F64", "F32", "Bf16", "F16", "F8E4M3", "F8E5M2"};
  return kNames.at(static_cast<std::size_t>(format));
}

std::vector<Isa> isas() {
  std::vector<Isa> all;
  for (const Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512, Isa::kNeon}) {
    const bool of_arm = isa == Isa::kNeon;
    if (isa == Isa::kBaseline || (isa <= best_isa() && of_arm == (best_isa() == Isa::kNeon))) {
      all.push_back(isa);
    }
  }
  return all;
}

std::vector<Fp8Rules> all_rules() {
  std::vector<Fp8Rules> all;
  for (int i = 0; i < 8; ++i) all.push_back({(i & 1) != 0, (i & 2) != 0, (i & 4) != 0});
  return all;
}

bool is_fp8(FloatFormat format) {
  return float_bytes(format) == 1;
}

// splitmix64 (Steele, Lea, Flood, 2014): the same numbers everywhere.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::uint64_t next() {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15ULL;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
    return z ^ (z >> 31);
  }
  std::uint64_t below(std::uint64_t end) { return next() % end; }

 private:
  std::uint64_t state_;
};

// --- The reference -------------------------------------------------------------------------------

struct Shape {
  int mantissa;
  int exponent;
  std::uint64_t nan;  // the quiet one, positive
};

Shape shape_of(FloatFormat format) {
  switch (format) {
    case FloatFormat::kF64:
      return {52, 11, 0x7ff8000000000000};
    case FloatFormat::kF32:
      return {23, 8, 0x7fc00000};
    case FloatFormat::kBf16:
      return {7, 8, 0x7fc0};
    case FloatFormat::kF16:
      return {10, 5, 0x7e00};
    case FloatFormat::kF8E4M3:
      return {3, 4, 0x7f};
    case FloatFormat::kF8E5M2:
      return {2, 5, 0x7f};
  }
  return {};
}

std::uint64_t sign_bit(FloatFormat format) {
  return std::uint64_t{1} << (float_bytes(format) * 8 - 1);
}

double value_of(FloatFormat format, std::uint64_t bits) {
  if (format == FloatFormat::kF64) return std::bit_cast<double>(bits);
  const Shape shape = shape_of(format);
  const double sign = (bits & sign_bit(format)) != 0 ? -1 : 1;
  const std::uint64_t magnitude = bits & (sign_bit(format) - 1);
  const auto fraction = static_cast<double>(magnitude & ((std::uint64_t{1} << shape.mantissa) - 1));
  const auto exponent = static_cast<int>(magnitude >> shape.mantissa);
  const int bias = (1 << (shape.exponent - 1)) - 1;
  const double one = std::ldexp(1, shape.mantissa);
  if (format == FloatFormat::kF8E4M3) {
    if (magnitude == 0x7f) return std::copysign(std::numeric_limits<double>::quiet_NaN(), sign);
  } else if (exponent == (1 << shape.exponent) - 1) {
    return std::copysign(fraction == 0 ? std::numeric_limits<double>::infinity()
                                       : std::numeric_limits<double>::quiet_NaN(),
                         sign);
  }
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias - shape.mantissa);
  return sign * std::ldexp(one + fraction, exponent - bias - shape.mantissa);
}

// The finite numbers from zero up: the position of a number is its code. The last entry is the next
// number that the format does not have: inputs from half way to it on overflow.
const std::vector<double>& numbers_of(FloatFormat format) {
  static std::array<std::vector<double>, kFloatFormatCount> all;
  std::vector<double>& numbers = all.at(static_cast<std::size_t>(format));
  if (numbers.empty()) {
    for (std::uint64_t code = 0; std::isfinite(value_of(format, code)); ++code) {
      numbers.push_back(value_of(format, code));
    }
    const double last = numbers.back();
    numbers.push_back(last + (last - numbers[numbers.size() - 2]));
  }
  return numbers;
}

std::uint64_t reference(FloatFormat from, FloatFormat to, std::uint64_t bits,
                        const Fp8Rules& rules) {
  if (from == to) return bits;
  const double value = value_of(from, bits);
  const std::uint64_t sign = std::signbit(value) ? sign_bit(to) : 0;
  if (std::isnan(value)) return sign | shape_of(to).nan;
  if (to == FloatFormat::kF64) return std::bit_cast<std::uint64_t>(value);
  const auto single = static_cast<float>(value);
  if (to == FloatFormat::kF32) return std::bit_cast<std::uint32_t>(single);

  const std::vector<double>& numbers = numbers_of(to);
  const std::uint64_t beyond = numbers.size() - 1;
  const double magnitude = std::abs(static_cast<double>(single));
  std::uint64_t code = beyond;
  if (magnitude < numbers.back()) {
    const auto above = std::upper_bound(numbers.begin(), numbers.end(), magnitude);
    code = static_cast<std::uint64_t>(above - numbers.begin()) - 1;
    const double middle = (numbers[code] + numbers[code + 1]) / 2;  // exact
    if (magnitude > middle || (magnitude == middle && code % 2 == 1)) ++code;
  }
  if (code == beyond && to == FloatFormat::kF8E4M3) {
    const bool saturates =
        std::isinf(single) ? rules.e4m3_infinity_saturates : rules.e4m3_saturates;
    code = saturates ? 0x7e : 0x7f;
  }
  if (code == beyond && to == FloatFormat::kF8E5M2 && rules.e5m2_saturates && !std::isinf(single)) {
    code = 0x7b;
  }
  return sign | code;  // bf16, fp16, e5m2: the code after the last number is infinity
}

// --- Inputs --------------------------------------------------------------------------------------

using Words = std::vector<std::uint64_t>;

void add_around(Words& words, std::uint64_t bits, FloatFormat format) {
  for (const std::uint64_t sign : {std::uint64_t{0}, sign_bit(format)}) {
    for (int step = -2; step <= 2; ++step) {
      words.push_back(((bits + static_cast<std::uint64_t>(step)) & (sign_bit(format) - 1)) | sign);
    }
  }
}

// Numbers, midpoints and neighbours of both of every narrower format, subnormals, NaNs.
Words special_f32() {
  Words words;
  for (const std::uint32_t bits :
       {0x00000000U, 0x00000004U, 0x00400000U, 0x007ffffeU, 0x00800000U, 0x3f800000U, 0x7f7ffffdU,
        0x7f800000U, 0x7f800001U, 0x7fa00000U, 0x7fc00000U, 0x7fffffffU}) {
    add_around(words, bits, FloatFormat::kF32);
  }
  for (const FloatFormat format : kFormats) {
    if (float_bytes(format) > 2) continue;
    const std::vector<double>& numbers = numbers_of(format);
    for (std::size_t i = 0; i + 1 < numbers.size(); ++i) {
      const double middle = (numbers[i] + numbers[i + 1]) / 2;
      add_around(words, std::bit_cast<std::uint32_t>(static_cast<float>(middle)),
                 FloatFormat::kF32);
    }
  }
  for (int bit = 0; bit < 32; ++bit) add_around(words, std::uint64_t{1} << bit, FloatFormat::kF32);
  return words;
}

Words all_f32() {
  Words words = special_f32();
  Random random(1);
  for (int i = 0; i < 1'000'000; ++i) words.push_back(random.next() & 0xffffffff);
  // Exponents that every format has.
  for (int i = 0; i < 500'000; ++i) {
    const std::uint64_t exponent = 127 - 28 + random.below(48);
    words.push_back((random.next() & 0x807fffff) | exponent << 23);
  }
  return words;
}

Words all_f64() {
  Words words;
  for (const std::uint64_t bits :
       {std::uint64_t{0}, std::uint64_t{4}, std::uint64_t{0x0010000000000000},
        std::uint64_t{0x7fefffffffffffff}, std::uint64_t{0x7ff0000000000000},
        std::uint64_t{0x7ff0000000000001}, std::uint64_t{0x7ff4000000000000},
        std::uint64_t{0x7ff8000000000000}, std::uint64_t{0x7ffffffffffffffd}}) {
    add_around(words, bits, FloatFormat::kF64);
  }
  // Just past the numbers that round to the largest fp32, and around the smallest.
  for (const double value : {0x1.fffffefffffffp127, 0x1.ffffffp127, 0x1p128, 0x1p-149, 0x1p-150,
                             0x1.8p-149, 0x1p-126, 0x1.fffffep-127, 0x1.ffffffp-127}) {
    add_around(words, std::bit_cast<std::uint64_t>(value), FloatFormat::kF64);
  }
  // Every special fp32 and fp64 numbers close to it: if the fp32 is a midpoint of a narrower format
  // and the fp64 is not, two roundings differ from one.
  for (const std::uint64_t bits : special_f32()) {
    const double value = value_of(FloatFormat::kF32, bits);
    if (!std::isfinite(value)) continue;
    const double unit = std::abs(value) * 0x1p-25;
    for (const double beside : {value, value + unit, value - unit, value + unit / 4096}) {
      words.push_back(std::bit_cast<std::uint64_t>(beside));
    }
  }
  Random random(2);
  for (int i = 0; i < 300'000; ++i) words.push_back(random.next());
  for (int i = 0; i < 300'000; ++i) {  // midpoints of fp32 and their neighbours, also subnormal
    const std::uint64_t low = random.below(0x7f7fffff);
    const double middle =
        (value_of(FloatFormat::kF32, low) + value_of(FloatFormat::kF32, low + 1)) / 2;
    const std::uint64_t sign = random.next() & sign_bit(FloatFormat::kF64);
    words.push_back((std::bit_cast<std::uint64_t>(middle) + random.below(3) - 1) | sign);
  }
  for (int i = 0; i < 300'000; ++i) {  // below the normal fp32
    const std::uint64_t exponent = 1023 - 155 + random.below(35);
    words.push_back((random.next() & 0x800fffffffffffff) | exponent << 52);
  }
  return words;
}

Words inputs_of(FloatFormat format) {
  if (format == FloatFormat::kF64) return all_f64();
  if (format == FloatFormat::kF32) return all_f32();
  Words words;
  for (std::uint64_t bits = 0; bits < sign_bit(format) * 2; ++bits) words.push_back(bits);
  return words;
}

std::vector<std::byte> packed(const Words& words, FloatFormat format) {
  const std::size_t bytes = float_bytes(format);
  std::vector<std::byte> result(words.size() * bytes);
  for (std::size_t i = 0; i < words.size(); ++i) {
    std::memcpy(&result[i * bytes], &words[i], bytes);  // little endian
  }
  return result;
}

std::uint64_t unpacked(const std::byte* bytes, std::size_t index, FloatFormat format) {
  std::uint64_t word = 0;
  std::memcpy(&word, bytes + index * float_bytes(format), float_bytes(format));
  return word;
}

std::vector<std::byte> expected_of(const Words& words, FloatFormat from, FloatFormat to,
                                   const Fp8Rules& rules) {
  Words results(words.size());
  for (std::size_t i = 0; i < words.size(); ++i) results[i] = reference(from, to, words[i], rules);
  return packed(results, to);
}

// Describes the first difference instead of printing two large arrays.
testing::AssertionResult same(const Words& inputs, FloatFormat from, FloatFormat to,
                              const std::byte* actual, const std::vector<std::byte>& expected) {
  if (std::memcmp(actual, expected.data(), expected.size()) == 0) {
    return testing::AssertionSuccess();
  }
  std::size_t i = 0;
  while (unpacked(actual, i, to) == unpacked(expected.data(), i, to)) ++i;
  return testing::AssertionFailure()
         << name_of(from) << " -> " << name_of(to) << " of 0x" << std::hex << inputs[i] << " is 0x"
         << unpacked(actual, i, to) << ", not 0x" << unpacked(expected.data(), i, to) << std::dec
         << " (element " << i << ")";
}

// --- The tests -----------------------------------------------------------------------------------

TEST(FloatFormats, AreThoseOfTheDtypes) {
  EXPECT_EQ(float_format(Dtype::kF64), FloatFormat::kF64);
  EXPECT_EQ(float_format(Dtype::kF32), FloatFormat::kF32);
  EXPECT_EQ(float_format(Dtype::kBf16), FloatFormat::kBf16);
  EXPECT_EQ(float_format(Dtype::kF16), FloatFormat::kF16);
  EXPECT_EQ(float_format(Dtype::kF8E4M3), FloatFormat::kF8E4M3);
  EXPECT_EQ(float_format(Dtype::kF8E5M2), FloatFormat::kF8E5M2);
  std::set<Dtype> castable;
  for (std::size_t i = 0; i < kDtypeCount; ++i) {
    const auto dtype = static_cast<Dtype>(i);
    if (const auto format = float_format(dtype)) {
      castable.insert(dtype);
      EXPECT_EQ(float_bytes(*format), dtype_bytes(dtype));
    }
  }
  EXPECT_EQ(castable.size(), kFloatFormatCount);
}

TEST(FloatFormats, TheReferenceKnowsTheFormats) {
  EXPECT_EQ(numbers_of(FloatFormat::kF8E4M3).size(), 0x7fU + 1);
  EXPECT_EQ(numbers_of(FloatFormat::kF8E4M3)[0x7e], 448);
  EXPECT_EQ(numbers_of(FloatFormat::kF8E5M2)[0x7b], 57344);
  EXPECT_EQ(numbers_of(FloatFormat::kF16)[0x7bff], 65504);
  EXPECT_EQ(numbers_of(FloatFormat::kF16)[1], 0x1p-24);
  EXPECT_EQ(numbers_of(FloatFormat::kBf16)[0x3f80], 1);
  for (const std::uint64_t bits : all_f32()) {
    const auto value = std::bit_cast<float>(static_cast<std::uint32_t>(bits));
    if (std::isnan(value)) continue;
    ASSERT_EQ(value_of(FloatFormat::kF32, bits), value);
  }
}

#if defined(__FLT16_MAX__)
TEST(FloatFormats, TheReferenceAgreesWithTheCompilersHalf) {
  for (const std::uint64_t bits : special_f32()) {
    const auto value = std::bit_cast<float>(static_cast<std::uint32_t>(bits));
    if (std::isnan(value)) continue;
    ASSERT_EQ(reference(FloatFormat::kF32, FloatFormat::kF16, bits, {}),
              std::bit_cast<std::uint16_t>(static_cast<_Float16>(value)));
  }
}
#endif

TEST(Isas, AreNamedAndChosen) {
  EXPECT_EQ(isa_name(Isa::kBaseline), "baseline");
  EXPECT_EQ(isa_name(Isa::kAvx2), "avx2");
  EXPECT_EQ(isa_name(Isa::kAvx512), "avx512");
  EXPECT_EQ(isa_name(Isa::kNeon), "neon");
#if defined(__aarch64__)
  EXPECT_EQ(best_isa(), Isa::kNeon);
#endif
  for (const FloatFormat from : kFormats) {
    for (const FloatFormat to : kFormats) {
      EXPECT_NE(host_cast(from, to), nullptr);
      EXPECT_EQ(host_cast(from, to), host_cast_for(best_isa(), from, to));
    }
  }
}

class EveryPair : public testing::TestWithParam<FloatFormat> {};

TEST_P(EveryPair, GivesTheNearestNumber) {
  const FloatFormat from = GetParam();
  const Words inputs = inputs_of(from);
  const std::vector<std::byte> source = packed(inputs, from);
  for (const FloatFormat to : kFormats) {
    for (const Fp8Rules& rules : {Fp8Rules{}, Fp8Rules{true, true, true}}) {
      if (!is_fp8(to) && rules.e4m3_saturates) continue;
      const std::vector<std::byte> expected = expected_of(inputs, from, to, rules);
      std::vector<std::byte> target(expected.size());
      for (const Isa isa : isas()) {
        std::fill(target.begin(), target.end(), std::byte{0xa5});
        host_cast_for(isa, from, to)(source.data(), target.data(), inputs.size(), rules);
        EXPECT_TRUE(same(inputs, from, to, target.data(), expected)) << isa_name(isa);
      }
    }
  }
}

// Modes of the thread that a program may have set (torch.set_flush_denormal, fesetround).
#if defined(__x86_64__)
unsigned long environment() {
  return _mm_getcsr();
}
void set_environment(unsigned long environment) {
  _mm_setcsr(static_cast<unsigned>(environment));
}
// Flush to zero, denormals are zero; and a rounding mode.
constexpr unsigned long kFlush = _MM_FLUSH_ZERO_ON | 0x40;
constexpr std::array<unsigned long, 2> kModes = {kFlush | _MM_ROUND_DOWN,
                                                 kFlush | _MM_ROUND_TOWARD_ZERO};
#elif defined(__aarch64__)
unsigned long environment() {
  unsigned long value = 0;
  __asm__ volatile("mrs %0, fpcr" : "=r"(value));
  return value;
}
void set_environment(unsigned long environment) {
  __asm__ volatile("msr fpcr, %0" : : "r"(environment) : "memory");
}
// Flush to zero, the default NaN, the alternative half format; and RMode: down, toward zero.
constexpr unsigned long kFlush = 1UL << 24 | 1UL << 25 | 1UL << 26;
constexpr std::array<unsigned long, 2> kModes = {kFlush | 2UL << 22, kFlush | 3UL << 22};
#endif

#if defined(__x86_64__) || defined(__aarch64__)
TEST_P(EveryPair, IgnoresTheFloatingPointEnvironment) {
  const FloatFormat from = GetParam();
  const Words inputs = inputs_of(from);
  const std::vector<std::byte> source = packed(inputs, from);
  for (const FloatFormat to : kFormats) {
    const std::vector<std::byte> expected = expected_of(inputs, from, to, {});
    std::vector<std::byte> target(expected.size());
    for (const Isa isa : isas()) {
      for (const unsigned long mode : kModes) {
        const unsigned long before = environment();
        set_environment(before | mode);
        host_cast_for(isa, from, to)(source.data(), target.data(), inputs.size(), {});
        const unsigned long after = environment();
        set_environment(before);
        // Without the sticky exception flags, which x86 keeps in the same register.
        EXPECT_EQ(after & ~0x3fUL, (before | mode) & ~0x3fUL);
        EXPECT_TRUE(same(inputs, from, to, target.data(), expected)) << isa_name(isa);
      }
    }
  }
}
#endif

INSTANTIATE_TEST_SUITE_P(Casts, EveryPair, testing::ValuesIn(kFormats), [](const auto& parameter) {
  return std::string(name_of(parameter.param));
});

TEST(Fp8RulesTest, DecideWhatIsBeyond) {
  const Words inputs = special_f32();
  const std::vector<std::byte> source = packed(inputs, FloatFormat::kF32);
  for (const Fp8Rules& rules : all_rules()) {
    for (const FloatFormat to : {FloatFormat::kF8E4M3, FloatFormat::kF8E5M2}) {
      const auto expected = expected_of(inputs, FloatFormat::kF32, to, rules);
      std::vector<std::byte> target(expected.size());
      for (const Isa isa : isas()) {
        host_cast_for(isa, FloatFormat::kF32, to)(source.data(), target.data(), inputs.size(),
                                                  rules);
        EXPECT_TRUE(same(inputs, FloatFormat::kF32, to, target.data(), expected));
      }
    }
  }
}

TEST(Nans, BecomeTheOneQuietNanWithTheirSign) {
  for (const float sign : {1.0F, -1.0F}) {
    for (const std::uint32_t payload : {0x7f800001U, 0x7f812345U, 0x7fc00000U, 0x7fffffffU}) {
      const std::uint32_t input = payload | (sign < 0 ? 0x80000000U : 0);
      for (const FloatFormat to : kFormats) {
        std::uint64_t output = 0;
        host_cast(FloatFormat::kF32, to)(reinterpret_cast<const std::byte*>(&input),
                                         reinterpret_cast<std::byte*>(&output), 1, {});
        const std::uint64_t nan = shape_of(to).nan | (sign < 0 ? sign_bit(to) : 0);
        EXPECT_EQ(output, to == FloatFormat::kF32 ? input : nan) << name_of(to);
      }
    }
  }
}

// Bytes that end where an unreadable page begins.
class BeforeTheEnd {
 public:
  explicit BeforeTheEnd(std::size_t bytes) {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    size_ = (bytes + page - 1) / page * page + page;
    base_ = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    end_ = static_cast<std::byte*>(base_) + size_ - page;
    mprotect(end_, page, PROT_NONE);
  }
  ~BeforeTheEnd() { munmap(base_, size_); }
  BeforeTheEnd(const BeforeTheEnd&) = delete;
  BeforeTheEnd& operator=(const BeforeTheEnd&) = delete;
  [[nodiscard]] std::byte* end() const { return end_; }

 private:
  void* base_ = nullptr;
  std::byte* end_ = nullptr;
  std::size_t size_ = 0;
};

class EveryPlace : public testing::TestWithParam<FloatFormat> {
 protected:
  static constexpr std::size_t kMost = 9000;
  static constexpr std::size_t kGuard = 64;
  static constexpr std::byte kCanary{0xc3};

  EveryPlace() : source_(kMost * 8 + 64), target_(kMost * 8 + 64 + 2 * kGuard + 64) {
    Random random(3);
    for (std::size_t i = 0; i < kMost; ++i) inputs_.push_back(random.next());
    const std::uint64_t bits = sign_bit(GetParam()) * 2;  // 0 for fp64: all 64
    for (std::uint64_t& input : inputs_) input &= bits - 1;
    packed_ = packed(inputs_, GetParam());
  }

  // `source_gap` bytes stay unused before the unreadable page, so that any alignment occurs.
  void check(HostCast cast, FloatFormat to, const std::vector<std::byte>& expected,
             std::size_t count, std::size_t source_gap, std::size_t target_offset) {
    const std::size_t in = count * float_bytes(GetParam());
    const std::size_t out = count * float_bytes(to);
    std::byte* source = source_.end() - source_gap - in;
    std::memcpy(source, packed_.data(), in);
    const std::uintptr_t line = (reinterpret_cast<std::uintptr_t>(target_.data()) + 63) / 64 * 64;
    std::byte* target = target_.data() + (line - reinterpret_cast<std::uintptr_t>(target_.data())) +
                        kGuard + target_offset;
    std::memset(target - kGuard, static_cast<int>(kCanary), out + 2 * kGuard);
    cast(source, target, count, {});
    ASSERT_EQ(std::memcmp(target, expected.data(), out), 0);
    for (std::size_t i = 0; i < kGuard; ++i) {
      ASSERT_EQ(*(target - kGuard + i), kCanary) << "before the target";
      ASSERT_EQ(target[out + i], kCanary) << "behind the target";
    }
  }

  Words inputs_;
  std::vector<std::byte> packed_;
  BeforeTheEnd source_;
  std::vector<std::byte> target_;
};

TEST_P(EveryPlace, OfAnyLengthAndAlignment) {
  const FloatFormat from = GetParam();
  constexpr std::array<std::size_t, 8> kOffsets = {0, 1, 2, 4, 7, 16, 33, 62};
  for (const FloatFormat to : kFormats) {
    const std::vector<std::byte> expected = expected_of(inputs_, from, to, {});
    for (const Isa isa : isas()) {
      const HostCast cast = host_cast_for(isa, from, to);
      SCOPED_TRACE(testing::Message()
                   << name_of(from) << " -> " << name_of(to) << ", " << isa_name(isa));
      for (std::size_t count = 0; count <= 130; ++count) {
        for (std::size_t i = 0; i < kOffsets.size(); ++i) {
          check(cast, to, expected, count, (count + i) % 9, kOffsets.at(i));
          if (HasFatalFailure()) FAIL() << count << " elements, target + " << kOffsets.at(i);
        }
      }
      for (const std::size_t count : {std::size_t{1000}, std::size_t{1024}, std::size_t{1025},
                                      std::size_t{4099}, std::size_t{8999}}) {
        for (std::size_t offset = 0; offset < 64; offset += 3) {
          check(cast, to, expected, count, offset % 9, offset);
          if (HasFatalFailure()) FAIL() << count << " elements, target + " << offset;
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Casts, EveryPlace, testing::ValuesIn(kFormats), [](const auto& parameter) {
  return std::string(name_of(parameter.param));
});

// --- Tiles ---------------------------------------------------------------------------------------

void run_kernel(const std::byte* chunk, std::uint64_t tiles_offset, std::uint32_t tile_count,
                const Fp8Rules& rules) {
  for (blockIdx.x = 0; blockIdx.x < tile_count + 1; ++blockIdx.x) {  // one that has no tile
    for (threadIdx.x = 0; threadIdx.x < kScatterThreads; ++threadIdx.x) {
      weightlift_scatter(chunk, tiles_offset, tile_count, rules);
    }
  }
}

// A chunk in the engine's layout (data, then the table), and the targets of its tiles.
class Chunk {
 public:
  explicit Chunk(std::uint64_t seed) : random_(seed) {}

  // Both at the wanted places within 64 bytes.
  void add(std::uint32_t cast, std::uint32_t count, std::size_t in, std::size_t out,
           std::size_t source_at, std::size_t target_at) {
    while (data_.size() % 64 != source_at) data_.push_back(std::byte{0xee});
    const std::uint64_t source = data_.size();
    for (std::size_t i = 0; i < count * in; ++i) {
      data_.push_back(static_cast<std::byte>(random_.next()));
    }
    target_size_ = (target_size_ + 63) / 64 * 64 + target_at;
    tiles_.push_back({source, target_size_, count, cast});
    target_size_ += count * out + 1;  // a byte that stays as it was
  }

  void add_cast(FloatFormat from, FloatFormat to, std::uint32_t count, std::size_t source_at,
                std::size_t target_at) {
    add(tile_cast(from, to), count, float_bytes(from), float_bytes(to), source_at, target_at);
  }

  struct Results {
    std::vector<std::byte> by_host;
    std::vector<std::byte> by_kernel;
    std::vector<std::byte> by_casts;
  };

  Results run(const Fp8Rules& rules) {
    while (data_.size() % alignof(Tile) != 0) data_.push_back(std::byte{0xee});
    const auto room = [this] { return std::vector<std::byte>(target_size_ + 64, std::byte{0xd7}); };
    Results results = {room(), room(), room()};
    const auto start = [](std::vector<std::byte>& memory) {
      auto address = reinterpret_cast<std::uintptr_t>(memory.data());
      return memory.data() + ((address + 63) / 64 * 64 - address);
    };
    const auto placed = [&](std::vector<std::byte>& memory) {
      std::vector<Tile> tiles = tiles_;
      for (Tile& tile : tiles) tile.target += reinterpret_cast<std::uintptr_t>(start(memory));
      return tiles;
    };

    scatter_on_host(data_.data(), placed(results.by_host), rules);

    std::vector<Tile> table = placed(results.by_kernel);
    const auto tile_count = static_cast<std::uint32_t>(table.size());
    // The bytes after the table are not a tile, though they may look like one.
    table.push_back({0, table.back().target, table.back().count + 1, kTileCopy});
    std::vector<std::byte> chunk(data_.size() + table.size() * sizeof(Tile) + 64);
    std::byte* base = start(chunk);
    std::memcpy(base, data_.data(), data_.size());
    std::memcpy(base + data_.size(), table.data(), table.size() * sizeof(Tile));
    run_kernel(base, data_.size(), tile_count, rules);

    for (const Tile& tile : tiles_) {
      const std::byte* source = data_.data() + tile.source;
      std::byte* target = start(results.by_casts) + tile.target;
      if (tile.cast == kTileCopy) {
        std::copy_n(source, tile.count, target);
      } else {
        host_cast(static_cast<FloatFormat>(tile.cast / kFloatFormatCount),
                  static_cast<FloatFormat>(tile.cast % kFloatFormatCount))(source, target,
                                                                           tile.count, rules);
      }
    }
    for (auto* memory : {&results.by_host, &results.by_kernel, &results.by_casts}) {
      memory->erase(memory->begin(), memory->begin() + (start(*memory) - memory->data()));
      memory->resize(target_size_);
    }
    return results;
  }

 private:
  Random random_;
  std::vector<std::byte> data_;
  std::vector<Tile> tiles_;
  std::uint64_t target_size_ = 0;
};

TEST(Scatter, CastsAsTheHost) {
  for (const Fp8Rules& rules : all_rules()) {
    Chunk chunk(4);
    for (const FloatFormat from : kFormats) {
      for (const FloatFormat to : kFormats) {
        for (const std::uint32_t count : {0U, 1U, 255U, 256U, 257U, 2048U}) {
          chunk.add_cast(from, to, count, 0, 0);
          chunk.add_cast(from, to, count, 8, 24);
          chunk.add_cast(from, to, count, 1, 16);
          chunk.add_cast(from, to, count, 32, 3);
          chunk.add_cast(from, to, count, 2, 4);
          chunk.add_cast(from, to, count, 5, 2);
        }
      }
    }
    const Chunk::Results results = chunk.run(rules);
    EXPECT_EQ(results.by_host, results.by_casts);
    EXPECT_EQ(results.by_kernel, results.by_casts);
  }
}

TEST(Scatter, CopiesFromAnywhereToAnywhere) {
  Chunk chunk(5);
  for (std::size_t source_at = 0; source_at < 17; ++source_at) {
    for (std::size_t target_at = 0; target_at < 17; ++target_at) {
      for (const std::uint32_t bytes : {0U, 1U, 3U, 15U, 16U, 17U, 31U, 250U, 5000U}) {
        chunk.add(kTileCopy, bytes, 1, 1, source_at, target_at);
      }
    }
  }
  chunk.add(kTileCopy, kTileBytes, 1, 1, 0, 0);
  const Chunk::Results results = chunk.run({});
  EXPECT_EQ(results.by_host, results.by_casts);
  EXPECT_EQ(results.by_kernel, results.by_casts);
}

// --- What is built -----------------------------------------------------------------------------

// Reads the images of this build by their file formats. Skips if there are none.
class Images : public ::testing::Test {
 protected:
  void SetUp() override {
    if (std::string_view(kernel_toolkit()).empty()) GTEST_SKIP() << "built without nvcc";
  }
  static Elf64_Ehdr header(const KernelImage& image) {
    Elf64_Ehdr header{};
    std::memcpy(&header, image.bytes.data(), sizeof header);
    return header;
  }
};

TEST_F(Images, AreOfTheArchitecturesThatAreStated) {
  std::vector<int> code;
  for (const KernelImage& image : scatter_images()) {
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(image.bytes.data()) % 64, 0U);
    if (!image.is_ptx) code.push_back(image.architecture);
  }
  EXPECT_EQ(code, (std::vector<int>{75, 80, 86, 89, 90, 100, 110, 120}));
}

TEST_F(Images, AreElfOfAnAbiThatTheirDriversRead) {
  constexpr unsigned kCudaMachine = 190;  // EM_CUDA
  for (const KernelImage& image : scatter_images()) {
    if (image.is_ptx) continue;
    SCOPED_TRACE(image.architecture);
    // Not compressed: a driver reads the file that begins here.
    ASSERT_GT(image.bytes.size(), sizeof(Elf64_Ehdr));
    const Elf64_Ehdr elf = header(image);
    ASSERT_EQ(std::memcmp(elf.e_ident, ELFMAG, SELFMAG), 0);
    EXPECT_EQ(elf.e_machine, kCudaMachine);
    const std::string_view text(reinterpret_cast<const char*>(image.bytes.data()),
                                image.bytes.size());
    EXPECT_NE(text.find(kScatterKernel), std::string_view::npos);
    // Drivers of the 12 series read only version 7 for architectures before Blackwell.
    const unsigned abi = elf.e_ident[EI_ABIVERSION];
    const auto architecture = static_cast<int>((abi < 8 ? elf.e_flags : elf.e_flags >> 8) & 0xff);
    EXPECT_EQ(architecture, image.architecture);
    const std::string maker = image.maker;
    if (image.architecture < 100 && maker.starts_with("ptxas 12.")) {
      EXPECT_EQ(abi, 7U);
    } else {
      EXPECT_EQ(abi, 8U);
    }
  }
}

TEST_F(Images, EndWithPtxThatCuda120Compiles) {
  const KernelImage& ptx = scatter_images().back();
  ASSERT_TRUE(ptx.is_ptx);
  EXPECT_EQ(ptx.architecture, 75);
  const std::string_view text(reinterpret_cast<const char*>(ptx.bytes.data()), ptx.bytes.size());
  EXPECT_EQ(text.find('\0'), std::string_view::npos);
  EXPECT_EQ(text.data()[text.size()], '\0');
  EXPECT_NE(text.find("\n.version 8.0\n.target sm_75\n"), std::string_view::npos);
  EXPECT_EQ(text.find("\n.version"), text.rfind("\n.version"));
}

TEST(ImageChoice, IsByTheMajorVersionAndNothingNewer) {
  const KernelImage code{.architecture = 86};
  EXPECT_TRUE(runs_on(code, 86));
  EXPECT_TRUE(runs_on(code, 89));
  EXPECT_FALSE(runs_on(code, 80));
  EXPECT_FALSE(runs_on(code, 90));
  const KernelImage ptx{.architecture = 75, .is_ptx = true};
  EXPECT_TRUE(runs_on(ptx, 75));
  EXPECT_TRUE(runs_on(ptx, 131));
  EXPECT_FALSE(runs_on(ptx, 70));
}

}  // namespace
}  // namespace weightlift::convert
