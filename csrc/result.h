// Errors as values. Nothing below bind/ throws: a function that can fail returns Result<T>, and
// bind/ raises the Error as a Python exception.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>

namespace weightlift {

// The Python exception that an error becomes: FormatError (the bytes of a file break its format),
// ReadError (the operating system did not deliver the bytes), DeviceError, MemoryError,
// ArgumentError or LoadCancelledError.
enum class ErrorKind : std::uint8_t { kFormat, kRead, kDevice, kMemory, kArgument, kCancelled };

// The closed list of errors, X(code, name, kind). Users see the name as `FormatError.code`.
// clang-format off
#define WL_ERROR_CODES(X)                                     \
  X(kEmptyFile,          "empty_file",          kFormat)      \
  X(kGitLfsPointer,      "git_lfs_pointer",     kFormat)      \
  X(kNotWeights,         "not_weights",         kFormat)      \
  X(kHeaderTooSmall,     "header_too_small",    kFormat)      \
  X(kHeaderTooLarge,     "header_too_large",    kFormat)      \
  X(kHeaderPastEnd,      "header_past_end",     kFormat)      \
  X(kHeaderNotUtf8,      "header_not_utf8",     kFormat)      \
  X(kHeaderNotJson,      "header_not_json",     kFormat)      \
  X(kHeaderTooDeep,      "header_too_deep",     kFormat)      \
  X(kHeaderNotObject,    "header_not_object",   kFormat)      \
  X(kMetadataInvalid,    "metadata_invalid",    kFormat)      \
  X(kTensorInvalid,      "tensor_invalid",      kFormat)      \
  X(kDuplicateName,      "duplicate_name",      kFormat)      \
  X(kUnknownDtype,       "unknown_dtype",       kFormat)      \
  X(kShapeOverflow,      "shape_overflow",      kFormat)      \
  X(kSubByteMisaligned,  "sub_byte_misaligned", kFormat)      \
  X(kSizeMismatch,       "size_mismatch",       kFormat)      \
  X(kOffsetsInvalid,     "offsets_invalid",     kFormat)      \
  X(kDataIncomplete,     "data_incomplete",     kFormat)      \
  X(kTrailingBytes,      "trailing_bytes",      kFormat)      \
  X(kNotArchive,         "not_archive",         kFormat)      \
  X(kArchiveIncomplete,  "archive_incomplete",  kFormat)      \
  X(kArchiveMalformed,   "archive_malformed",   kFormat)      \
  X(kArchiveMismatch,    "archive_mismatch",    kFormat)      \
  X(kArchiveUnsupported, "archive_unsupported", kFormat)      \
  X(kArchiveTooLarge,    "archive_too_large",   kFormat)      \
  X(kNotFound,           "not_found",           kRead)        \
  X(kPermissionDenied,   "permission_denied",   kRead)        \
  X(kIsDirectory,        "is_directory",        kRead)        \
  X(kNotRegularFile,     "not_regular_file",    kRead)        \
  X(kFileShrank,         "file_shrank",         kRead)        \
  X(kFileChanged,        "file_changed",        kRead)        \
  X(kReadFailed,         "read_failed",         kRead)        \
  X(kNoDriver,           "no_driver",           kDevice)      \
  X(kDriverTooOld,       "driver_too_old",      kDevice)      \
  X(kNoSuchDevice,       "no_such_device",      kDevice)      \
  X(kDriverCallFailed,   "driver_call_failed",  kDevice)      \
  X(kForkedProcess,      "forked_process",      kDevice)      \
  X(kOutOfMemory,        "out_of_memory",       kMemory)      \
  X(kInvalidArgument,    "invalid_argument",    kArgument)    \
  X(kUnsupportedDtype,   "unsupported_dtype",   kArgument)    \
  X(kCancelled,          "cancelled",           kCancelled)
// clang-format on

#define WL_ERROR_CODE(code, name, kind) code,
enum class ErrorCode : std::uint8_t { WL_ERROR_CODES(WL_ERROR_CODE) };
#undef WL_ERROR_CODE

[[nodiscard]] ErrorKind error_kind(ErrorCode code) noexcept;
[[nodiscard]] std::string_view error_name(ErrorCode code) noexcept;  // "header_too_large"

struct Error {
  ErrorCode code = ErrorCode::kInvalidArgument;
  // What is wrong and what to do, without the path and the tensor. Empty if memory for it cannot,
  // or must not, be allocated: text() then returns a fixed text for the code.
  std::string message = {};
  std::string path = {};
  std::string tensor = {};
  std::optional<std::uint64_t> offset = {};  // bytes from the start of the file
  int system_errno = 0;

  [[nodiscard]] std::string_view text() const noexcept;
  [[nodiscard]] std::string describe() const;  // one line: path, tensor, offset, message
};

template <class T>
class Result;
using Status = Result<void>;

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

  // The error, if there is one, without the value.
  [[nodiscard]] Status status() const&;
  [[nodiscard]] Status status() &&;

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

template <class T>
Status Result<T>::status() const& {
  return ok() ? Status() : Status(error());
}
template <class T>
Status Result<T>::status() && {
  return ok() ? Status() : Status(std::move(*this).error());
}

}  // namespace weightlift

// Both macros are one statement, also in an `if` without braces.

// Returns the error of `expression` from the function, if there is one.
#define WL_RETURN_IF_ERROR(expression)                    \
  do {                                                    \
    if (auto wl_status = (expression); !wl_status.ok()) { \
      return std::move(wl_status).error();                \
    }                                                     \
  } while (false)

// `WL_ASSIGN_OR_RETURN(auto file, File::open(path));` returns the error from the function, or
// assigns the value to `file`. A statement expression (gcc and clang), because a check and the
// declaration after it cannot otherwise be one statement.
#define WL_ASSIGN_OR_RETURN(declaration, expression)          \
  declaration = __extension__({                               \
    auto wl_result = (expression);                            \
    if (!wl_result.ok()) return std::move(wl_result).error(); \
    *std::move(wl_result);                                    \
  })
