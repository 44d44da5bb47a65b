#include "result.h"

#include <array>
#include <cstddef>
#include <string>
#include <string_view>

namespace weightlift {

namespace {

struct Described {
  std::string_view name;
  ErrorKind kind;
};

#define WL_ERROR_CODE(code, name, kind) Described{name, ErrorKind::kind},
constexpr std::array kDescribed = {WL_ERROR_CODES(WL_ERROR_CODE)};
#undef WL_ERROR_CODE

}  // namespace

ErrorKind error_kind(ErrorCode code) noexcept {
  return kDescribed[static_cast<std::size_t>(code)].kind;
}

std::string_view error_name(ErrorCode code) noexcept {
  return kDescribed[static_cast<std::size_t>(code)].name;
}

std::string_view Error::text() const noexcept {
  if (!message.empty()) return message;
  if (code == ErrorCode::kCancelled) return "the load was cancelled";
  return "out of memory while loading: free memory, or load fewer tensors at a time";
}

std::string Error::describe() const {
  std::string line;
  if (!path.empty()) line += path + ": ";
  if (!tensor.empty()) line += "tensor '" + tensor + "': ";
  line += text();
  if (offset) line += " (at byte " + std::to_string(*offset) + ")";
  return line;
}

}  // namespace weightlift
