#include "result.h"

namespace weightlift {

ErrorKind error_kind(ErrorCode code) noexcept {
  if (code <= ErrorCode::kArchiveTooLarge) return ErrorKind::kFormat;
  if (code <= ErrorCode::kReadFailed) return ErrorKind::kRead;
  if (code <= ErrorCode::kForkedProcess) return ErrorKind::kDevice;
  if (code == ErrorCode::kOutOfMemory) return ErrorKind::kMemory;
  if (code == ErrorCode::kCancelled) return ErrorKind::kCancelled;
  return ErrorKind::kArgument;
}

std::string_view error_name(ErrorCode code) noexcept {
  switch (code) {
    case ErrorCode::kEmptyFile:
      return "empty_file";
    case ErrorCode::kGitLfsPointer:
      return "git_lfs_pointer";
    case ErrorCode::kNotWeights:
      return "not_weights";
    case ErrorCode::kHeaderTooSmall:
      return "header_too_small";
    case ErrorCode::kHeaderTooLarge:
      return "header_too_large";
    case ErrorCode::kHeaderPastEnd:
      return "header_past_end";
    case ErrorCode::kHeaderNotUtf8:
      return "header_not_utf8";
    case ErrorCode::kHeaderNotJson:
      return "header_not_json";
    case ErrorCode::kHeaderTooDeep:
      return "header_too_deep";
    case ErrorCode::kHeaderNotObject:
      return "header_not_object";
    case ErrorCode::kMetadataInvalid:
      return "metadata_invalid";
    case ErrorCode::kTensorInvalid:
      return "tensor_invalid";
    case ErrorCode::kDuplicateName:
      return "duplicate_name";
    case ErrorCode::kUnknownDtype:
      return "unknown_dtype";
    case ErrorCode::kShapeOverflow:
      return "shape_overflow";
    case ErrorCode::kSubByteMisaligned:
      return "sub_byte_misaligned";
    case ErrorCode::kSizeMismatch:
      return "size_mismatch";
    case ErrorCode::kOffsetsInvalid:
      return "offsets_invalid";
    case ErrorCode::kDataIncomplete:
      return "data_incomplete";
    case ErrorCode::kTrailingBytes:
      return "trailing_bytes";
    case ErrorCode::kNotArchive:
      return "not_archive";
    case ErrorCode::kArchiveIncomplete:
      return "archive_incomplete";
    case ErrorCode::kArchiveMalformed:
      return "archive_malformed";
    case ErrorCode::kArchiveMismatch:
      return "archive_mismatch";
    case ErrorCode::kArchiveUnsupported:
      return "archive_unsupported";
    case ErrorCode::kArchiveTooLarge:
      return "archive_too_large";
    case ErrorCode::kNotFound:
      return "not_found";
    case ErrorCode::kPermissionDenied:
      return "permission_denied";
    case ErrorCode::kIsDirectory:
      return "is_directory";
    case ErrorCode::kNotRegularFile:
      return "not_regular_file";
    case ErrorCode::kFileShrank:
      return "file_shrank";
    case ErrorCode::kFileChanged:
      return "file_changed";
    case ErrorCode::kReadFailed:
      return "read_failed";
    case ErrorCode::kNoDriver:
      return "no_driver";
    case ErrorCode::kDriverTooOld:
      return "driver_too_old";
    case ErrorCode::kNoSuchDevice:
      return "no_such_device";
    case ErrorCode::kDriverCallFailed:
      return "driver_call_failed";
    case ErrorCode::kForkedProcess:
      return "forked_process";
    case ErrorCode::kOutOfMemory:
      return "out_of_memory";
    case ErrorCode::kInvalidArgument:
      return "invalid_argument";
    case ErrorCode::kUnsupportedDtype:
      return "unsupported_dtype";
    case ErrorCode::kCancelled:
      return "cancelled";
  }
  return "unknown";
}

std::string_view Error::text() const noexcept {
  if (!message.empty()) return message;
  if (code == ErrorCode::kCancelled) return "the load was cancelled";
  return "out of memory while loading: free some, or load fewer tensors at a time";
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
