// Errors as values. Nothing below bind/ throws: a function that can fail returns Result<T>, and
// bind/ turns the first Error it meets into one Python exception.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>

namespace weightlift {

// The closed list of what can go wrong. The group decides the Python exception (error_kind), the
// name is what users see as `FormatError.code`.
enum class ErrorCode : std::uint8_t {
  // The bytes of a file break its format: FormatError.
  kEmptyFile,
  kGitLfsPointer,
  kNotWeights,
  kHeaderTooSmall,
  kHeaderTooLarge,
  kHeaderPastEnd,
  kHeaderNotUtf8,
  kHeaderNotJson,
  kHeaderTooDeep,
  kHeaderNotObject,
  kMetadataInvalid,
  kTensorInvalid,
  kDuplicateName,
  kUnknownDtype,
  kShapeOverflow,
  kSubByteMisaligned,
  kSizeMismatch,
  kOffsetsInvalid,
  kDataIncomplete,
  kTrailingBytes,
  // Those of archives; besides kDuplicateName, kOffsetsInvalid, kSizeMismatch and kTrailingBytes.
  kNotArchive,
  kArchiveIncomplete,
  kArchiveMalformed,
  kArchiveMismatch,
  kArchiveUnsupported,
  kArchiveTooLarge,
  // The operating system would not give the bytes: ReadError.
  kNotFound,
  kPermissionDenied,
  kIsDirectory,
  kNotRegularFile,
  kFileShrank,
  kFileChanged,
  kReadFailed,
  // DeviceError.
  kNoDriver,
  kDriverTooOld,
  kNoSuchDevice,
  kDriverCallFailed,
  kForkedProcess,
  // MemoryError, ValueError and KeyError, KeyboardInterrupt.
  kOutOfMemory,
  kInvalidArgument,
  kUnsupportedDtype,
  kCancelled,
};

enum class ErrorKind : std::uint8_t { kFormat, kRead, kDevice, kMemory, kArgument, kCancelled };

[[nodiscard]] ErrorKind error_kind(ErrorCode code) noexcept;
[[nodiscard]] std::string_view error_name(ErrorCode code) noexcept;  // "header_too_large"

struct Error {
  ErrorCode code = ErrorCode::kInvalidArgument;
  // What is wrong and what to do, without the path and the tensor. Empty where no memory can be had
  // for it, or may not be asked for: text() is then what the code alone says.
  std::string message = {};
  std::string path = {};
  std::string tensor = {};
  std::optional<std::uint64_t> offset = {};  // bytes from the start of the file
  int system_errno = 0;

  [[nodiscard]] std::string_view text() const noexcept;
  [[nodiscard]] std::string describe() const;  // one line: path, tensor, offset, message
};

// A value or an Error. `*result` and `result->` are for callers that have checked `ok()`.
template <class T>
class [[nodiscard]] Result {
 public:
  Result(T value) : state_(std::in_place_index<0>, std::move(value)) {}      // NOLINT(*explicit*)
  Result(Error error) : state_(std::in_place_index<1>, std::move(error)) {}  // NOLINT(*explicit*)

  [[nodiscard]] bool ok() const noexcept { return state_.index() == 0; }
  [[nodiscard]] T& operator*() & noexcept { return *std::get_if<0>(&state_); }
  [[nodiscard]] const T& operator*() const& noexcept { return *std::get_if<0>(&state_); }
  [[nodiscard]] T&& operator*() && noexcept { return std::move(*std::get_if<0>(&state_)); }
  [[nodiscard]] T* operator->() noexcept { return std::get_if<0>(&state_); }
  [[nodiscard]] const T* operator->() const noexcept { return std::get_if<0>(&state_); }
  [[nodiscard]] Error& error() & noexcept { return *std::get_if<1>(&state_); }
  [[nodiscard]] const Error& error() const& noexcept { return *std::get_if<1>(&state_); }
  [[nodiscard]] Error&& error() && noexcept { return std::move(*std::get_if<1>(&state_)); }

 private:
  std::variant<T, Error> state_;
};

template <>
class [[nodiscard]] Result<void> {
 public:
  Result() = default;
  Result(Error error) : error_(std::move(error)) {}  // NOLINT(*explicit*)

  [[nodiscard]] bool ok() const noexcept { return !error_.has_value(); }
  [[nodiscard]] Error& error() & noexcept { return *error_; }
  [[nodiscard]] const Error& error() const& noexcept { return *error_; }
  [[nodiscard]] Error&& error() && noexcept { return *std::move(error_); }

 private:
  std::optional<Error> error_;
};

using Status = Result<void>;

}  // namespace weightlift

#define WL_CONCAT_INNER(a, b) a##b
#define WL_CONCAT(a, b) WL_CONCAT_INNER(a, b)

// Leaves the function with the error of `expression`, if it has one.
#define WL_RETURN_IF_ERROR(expression)                    \
  do {                                                    \
    if (auto wl_status = (expression); !wl_status.ok()) { \
      return std::move(wl_status).error();                \
    }                                                     \
  } while (false)

// `WL_ASSIGN_OR_RETURN(auto file, File::open(path));`
#define WL_ASSIGN_OR_RETURN(declaration, expression) \
  WL_ASSIGN_OR_RETURN_INNER(WL_CONCAT(wl_result_, __LINE__), declaration, expression)
#define WL_ASSIGN_OR_RETURN_INNER(name, declaration, expression) \
  auto name = (expression);                                      \
  if (!name.ok()) return std::move(name).error();                \
  declaration = *std::move(name)
