#include <fcntl.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "io/anonymous_memory.h"
#include "io/file.h"
#include "io/leased_mapping.h"
#include "io/machine.h"
#include "io/mapping.h"
#include "io/residency.h"

namespace {

// The results of the next reads and advice calls, if a test sets them; else the system's.
using Read = std::function<std::optional<ssize_t>(void* target, std::size_t bytes, off_t offset)>;
Read& fake_read() {
  static Read read;
  return read;
}
std::function<std::optional<int>(int advice)>& fake_advice() {
  static std::function<std::optional<int>(int)> advise;
  return advise;
}

std::function<bool(int command)>& fcntl_fails() {
  static std::function<bool(int)> fails;
  return fails;
}

}  // namespace

// Replace the C library's functions in this program.
extern "C" int fcntl(int fd, int command, ...) {
  std::va_list arguments;
  va_start(arguments, command);
  const long argument = va_arg(arguments, long);
  va_end(arguments);
  if (fcntl_fails() && fcntl_fails()(command)) {
    errno = EIO;
    return -1;
  }
  return static_cast<int>(::syscall(SYS_fcntl, fd, command, argument));
}

extern "C" ssize_t pread(int fd, void* target, std::size_t bytes, off_t offset) {
  if (fake_read()) {
    if (const auto answer = fake_read()(target, bytes, offset)) return *answer;
  }
  return ::syscall(SYS_pread64, fd, target, bytes, offset);
}

extern "C" int madvise(void* data, std::size_t bytes, int advice) noexcept {
  if (fake_advice()) {
    if (const auto answer = fake_advice()(advice)) return *answer;
  }
  return static_cast<int>(::syscall(SYS_madvise, data, bytes, advice));
}

namespace weightlift::io {
namespace {

namespace fs = std::filesystem;

class IoTest : public ::testing::Test {
 protected:
  IoTest() {
    std::string pattern = (fs::temp_directory_path() / "weightlift-io-XXXXXX").string();
    folder_ = ::mkdtemp(pattern.data());
  }
  ~IoTest() override {
    fake_read() = nullptr;
    fake_advice() = nullptr;
    fcntl_fails() = nullptr;
    fs::remove_all(folder_);
  }

  fs::path write(const std::string& name, const std::string& content) const {
    const fs::path path = folder_ / name;
    fs::create_directories(path.parent_path());
    std::ofstream(path, std::ios::binary) << content;
    return path;
  }

  // `size` bytes that depend on their position, written to the disk.
  std::shared_ptr<File> numbered(std::size_t size) {
    const fs::path path = write("numbered", numbers(size));
    const int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
    EXPECT_EQ(::fsync(fd), 0);
    ::close(fd);
    auto file = File::open(path.string());
    EXPECT_TRUE(file.ok());
    return *file;
  }

  static std::string numbers(std::size_t size) {
    std::string bytes(size, '\0');
    std::uint32_t state = 1;
    for (char& byte : bytes) {
      state = state * 1664525 + 1013904223;
      byte = static_cast<char>(state >> 24);
    }
    return bytes;
  }

  fs::path folder_;
};

std::string text(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// --- File --------------------------------------------------------------------------------------

TEST_F(IoTest, OpensAFile) {
  const auto file = numbered(12345);
  EXPECT_EQ(file->size(), 12345U);
  EXPECT_EQ(file->path(), (folder_ / "numbered").string());
  EXPECT_NE(::fcntl((*file->descriptor())->get(), F_GETFD) & FD_CLOEXEC, 0);
}

TEST_F(IoTest, SaysWhyAFileCannotBeOpened) {
  const auto code = [](const fs::path& path) {
    const auto file = File::open(path.string());
    if (file.ok()) return std::pair(ErrorCode::kCancelled, 0);
    EXPECT_EQ(file.error().path, path.string());
    EXPECT_FALSE(file.error().message.empty());
    return std::pair(file.error().code, file.error().system_errno);
  };
  EXPECT_EQ(code(folder_ / "missing"), std::pair(ErrorCode::kNotFound, ENOENT));
  EXPECT_EQ(code(write("file", "x") / "below"), std::pair(ErrorCode::kNotFound, ENOTDIR));
  EXPECT_EQ(code(""), std::pair(ErrorCode::kNotFound, ENOENT));
  EXPECT_EQ(code(folder_), std::pair(ErrorCode::kIsDirectory, EISDIR));
  EXPECT_EQ(code(folder_ / std::string(300, 'n')), std::pair(ErrorCode::kReadFailed, ENAMETOOLONG));
  fs::create_symlink("circle", folder_ / "circle");
  EXPECT_EQ(code(folder_ / "circle"), std::pair(ErrorCode::kReadFailed, ELOOP));
  ASSERT_EQ(::mkfifo((folder_ / "pipe").c_str(), 0600), 0);
  EXPECT_EQ(code(folder_ / "pipe").first, ErrorCode::kNotRegularFile);
  EXPECT_EQ(code("/dev/zero").first, ErrorCode::kNotRegularFile);
  EXPECT_EQ(code(std::string("a\0b", 3)).first, ErrorCode::kInvalidArgument);
}

TEST_F(IoTest, ReadsExactlyWhatIsAsked) {
  const std::string content = numbers(10'000);
  const auto file = numbered(content.size());
  for (const auto& [offset, bytes] :
       {std::pair{0U, 10'000U}, {0U, 0U}, {10'000U, 0U}, {9'999U, 1U}, {4'095U, 4'098U}}) {
    std::vector<std::byte> target(bytes);
    ASSERT_TRUE(file->read_exact(offset, target).ok());
    EXPECT_EQ(text(target), content.substr(offset, bytes));
  }
}

TEST_F(IoTest, ContinuesInterruptedAndShortReads) {
  const std::string content = numbers(10'000);
  const auto file = numbered(content.size());
  int calls = 0;
  fake_read() = [&](void* target, std::size_t bytes, off_t offset) -> std::optional<ssize_t> {
    if (++calls % 2 == 0) {
      errno = EINTR;
      return -1;
    }
    const std::size_t now = std::min<std::size_t>(bytes, 7);
    std::copy_n(content.data() + offset, now, static_cast<char*>(target));
    return static_cast<ssize_t>(now);
  };
  std::vector<std::byte> target(5'000);
  ASSERT_TRUE(file->read_exact(1'234, target).ok());
  EXPECT_EQ(text(target), content.substr(1'234, 5'000));
  EXPECT_GT(calls, 1'400);
}

TEST_F(IoTest, AReadThatFailsSaysWhere) {
  const auto file = numbered(10'000);
  for (const int number : {EIO, EAGAIN, ENOMEM}) {
    fake_read() = [&](void*, std::size_t, off_t offset) -> std::optional<ssize_t> {
      if (offset < 300) return 100;
      errno = number;
      return -1;
    };
    std::vector<std::byte> target(5'000);
    const Status status = file->read_exact(200, target);
    ASSERT_FALSE(status.ok());
    EXPECT_EQ(status.error().system_errno, number);
    EXPECT_EQ(status.error().offset, 300U);
    EXPECT_EQ(status.error().path, file->path());
    EXPECT_EQ(status.error().code,
              number == ENOMEM ? ErrorCode::kOutOfMemory : ErrorCode::kReadFailed);
  }
}

TEST_F(IoTest, AFileThatEndsEarlyIsAnError) {
  const auto file = numbered(10'000);
  ASSERT_EQ(::truncate(file->path().c_str(), 6'000), 0);
  std::vector<std::byte> target(5'000);
  EXPECT_TRUE(file->read_exact(1'000, target).ok());
  const Status status = file->read_exact(1'001, target);
  ASSERT_FALSE(status.ok());
  EXPECT_EQ(status.error().code, ErrorCode::kFileShrank);
  EXPECT_EQ(status.error().offset, 6'000U);
}

TEST_F(IoTest, NoticesThatAFileHasChanged) {
  const auto code = [](const File& file) -> std::optional<ErrorCode> {
    const auto status = file.check_unchanged();
    return status.ok() ? std::nullopt : std::optional(status.error().code);
  };
  auto file = numbered(10'000);
  EXPECT_EQ(code(*file), std::nullopt);
  ASSERT_EQ(::truncate(file->path().c_str(), 9'999), 0);
  EXPECT_EQ(code(*file), ErrorCode::kFileShrank);

  file = numbered(10'000);
  ASSERT_EQ(::truncate(file->path().c_str(), 10'001), 0);
  EXPECT_EQ(code(*file), ErrorCode::kFileChanged);

  file = numbered(10'000);
  const timespec times[2] = {{.tv_sec = 5, .tv_nsec = 0}, {.tv_sec = 5, .tv_nsec = 1}};
  std::vector<std::byte> index(100);
  ASSERT_TRUE(file->read_index(50, index).ok());
  ASSERT_EQ(::utimensat(AT_FDCWD, file->path().c_str(), times, 0), 0);
  EXPECT_EQ(code(*file), std::nullopt);
  EXPECT_EQ(*file->check_unchanged(), File::Change::kTime);
  file->accept_time();
  EXPECT_EQ(*file->check_unchanged(), File::Change::kNone);

  file = numbered(10'000);
  ASSERT_TRUE(file->read_index(50, index).ok());
  const int fd = ::open(file->path().c_str(), O_WRONLY | O_CLOEXEC);
  ASSERT_EQ(::pwrite(fd, "other", 5, 60), 5);
  ::close(fd);
  ASSERT_EQ(::utimensat(AT_FDCWD, file->path().c_str(), times, 0), 0);
  EXPECT_EQ(code(*file), ErrorCode::kFileChanged);

  // Another file gets its name: this one is unchanged.
  file = numbered(10'000);
  fs::remove(file->path());
  write("numbered", "other");
  EXPECT_EQ(code(*file), std::nullopt);
}

// --- DirectFile --------------------------------------------------------------------------------

class DirectTest : public IoTest {
 protected:
  // Null if the file system has no direct I/O; open() must then return that error.
  std::unique_ptr<DirectFile> open(const std::shared_ptr<File>& file) {
    auto direct = DirectFile::open(file);
    if (direct.ok()) return *std::move(direct);
    EXPECT_EQ(direct.error().system_errno, EINVAL);
    EXPECT_EQ(direct.error().path, file->path());
    return nullptr;
  }
};

TEST_F(DirectTest, ReadsWhatOrdinaryReadsRead) {
  const std::string content = numbers(3 * 65'536 + 777);
  const auto file = numbered(content.size());
  const auto direct = open(file);
  if (direct == nullptr) return;
  const std::uint64_t unit = direct->alignment();
  EXPECT_GE(unit, 4096U);
  auto memory = AnonymousMemory::allocate(content.size() + 2 * unit);
  ASSERT_TRUE(memory.ok());
  for (const std::uint64_t begin : {0UL, 1UL, 511UL, 512UL, 4095UL, 4096UL, 4097UL, 65'537UL}) {
    for (const std::uint64_t end :
         {begin + 1, begin + 4096, begin + 65'536, std::uint64_t{content.size()}}) {
      const std::uint64_t first = begin / unit * unit;
      const std::uint64_t last = (end + unit - 1) / unit * unit;
      ASSERT_TRUE(direct->read(first, {memory->data(), last - first}, end - first).ok());
      std::vector<std::byte> expected(end - begin);
      ASSERT_TRUE(file->read_exact(begin, expected).ok());
      EXPECT_EQ(text({memory->data() + (begin - first), end - begin}), text(expected));
      EXPECT_EQ(text(expected), content.substr(begin, end - begin));
    }
  }
}

TEST_F(DirectTest, IsTheFileThatWasOpenedWhateverItsNameMeansNow) {
  const std::string content = numbers(8192);
  const auto file = numbered(content.size());
  fs::remove(file->path());
  write("numbered", std::string(8192, 'x'));
  const auto direct = open(file);
  if (direct == nullptr) return;
  auto memory = AnonymousMemory::allocate(8192);
  ASSERT_TRUE(memory.ok());
  ASSERT_TRUE(direct->read(0, {memory->data(), 8192}, 8192).ok());
  EXPECT_EQ(text({memory->data(), 8192}), content);
}

TEST_F(DirectTest, BuildsOnWholeBlocksOfShortReads) {
  const std::string content = numbers(8 * 4096);
  const auto file = numbered(content.size());
  const auto direct = open(file);
  if (direct == nullptr || direct->alignment() != 4096) return;
  int calls = 0;
  fake_read() = [&](void* target, std::size_t bytes, off_t offset) -> std::optional<ssize_t> {
    if (++calls % 3 == 0) {
      errno = EINTR;
      return -1;
    }
    EXPECT_EQ(offset % 4096, 0);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(target) % 4096, 0U);
    const std::size_t now = std::min<std::size_t>(bytes, 5'000);  // no whole number of blocks
    std::copy_n(content.data() + offset, now, static_cast<char*>(target));
    return static_cast<ssize_t>(now);
  };
  auto memory = AnonymousMemory::allocate(content.size());
  ASSERT_TRUE(memory.ok());
  ASSERT_TRUE(direct->read(0, {memory->data(), content.size()}, content.size() - 10).ok());
  EXPECT_EQ(text({memory->data(), content.size() - 10}), content.substr(0, content.size() - 10));
}

TEST_F(DirectTest, SaysThatTheFileShrankOrFailed) {
  const auto file = numbered(3 * 4096);
  const auto direct = open(file);
  if (direct == nullptr || direct->alignment() != 4096) return;
  auto memory = AnonymousMemory::allocate(4 * 4096);
  ASSERT_TRUE(memory.ok());
  const std::span<std::byte> window(memory->data(), 4 * 4096);
  EXPECT_TRUE(direct->read(0, window, 3 * 4096).ok());
  for (const std::uint64_t left : {4096U, 5000U, 0U}) {
    ASSERT_EQ(::truncate(file->path().c_str(), static_cast<off_t>(left)), 0);
    const Status status = direct->read(0, window, 3 * 4096);
    ASSERT_FALSE(status.ok());
    EXPECT_EQ(status.error().code, ErrorCode::kFileShrank);
    EXPECT_EQ(status.error().offset, left);
  }
  fake_read() = [](void*, std::size_t, off_t) -> std::optional<ssize_t> {
    errno = EIO;
    return -1;
  };
  const Status status = direct->read(4096, window.first(4096), 4096);
  ASSERT_FALSE(status.ok());
  EXPECT_EQ(status.error().code, ErrorCode::kReadFailed);
  EXPECT_EQ(status.error().system_errno, EIO);
  EXPECT_EQ(status.error().offset, 4096U);
}

// --- Mapping -----------------------------------------------------------------------------------

TEST_F(IoTest, MapsAFileForReadingAndForWritingOfItsOwn) {
  const std::string content = numbers(10'000);
  const auto file = numbered(content.size());
  auto mapping = Mapping::map(file);
  ASSERT_TRUE(mapping.ok());
  EXPECT_EQ(text({(*mapping)->data(), content.size()}), content);
  std::fill_n((*mapping)->data(), 5'000, std::byte{7});
  std::vector<std::byte> again(content.size());
  ASSERT_TRUE(file->read_exact(0, again).ok());
  EXPECT_EQ(text(again), content);
}

// The number of this process's descriptors.
std::size_t descriptors() {
  const fs::directory_iterator all("/proc/self/fd");
  return static_cast<std::size_t>(std::distance(begin(all), fs::end(all)));
}

class ManyFilesTest : public IoTest {
 protected:
  static constexpr std::size_t kFiles = 300;
  ManyFilesTest() {
    for (std::size_t i = 0; i < kFiles; ++i) {
      const auto path = write(std::to_string(i), std::to_string(i));
      auto file = File::open(path.string());
      EXPECT_TRUE(file.ok());
      if (file.ok()) files_.push_back(*std::move(file));
    }
  }
  static std::string content(const File& file) {
    std::vector<std::byte> bytes(file.size());
    const Status status = file.read_exact(0, bytes);
    return status.ok() ? text(bytes) : status.error().message;
  }
  std::vector<std::shared_ptr<File>> files_;
};

TEST_F(ManyFilesTest, FewOfThemAreOpenAtATime) {
  EXPECT_LE(descriptors(), descriptor_limit(kFiles) + 20);
  for (std::size_t i = 0; i < files_.size(); ++i) EXPECT_EQ(content(*files_[i]), std::to_string(i));
  EXPECT_LE(descriptors(), descriptor_limit(kFiles) + 20);
  const auto before = descriptors();
  files_.clear();
  EXPECT_LT(descriptors(), before);
}

TEST_F(ManyFilesTest, OnesThatAreUsedStayOpen) {
  std::vector<PooledDescriptor::Handle> handles;
  for (std::size_t i = 0; i < 100; ++i) handles.push_back(*files_[i]->descriptor());
  for (const auto& file : files_) EXPECT_FALSE(content(*file).empty());
  for (const auto& handle : handles) EXPECT_NE(::fcntl(handle->get(), F_GETFD), -1);
}

TEST_F(ManyFilesTest, ThreadsShareThem) {
  std::vector<std::thread> threads;
  std::atomic<int> wrong = 0;
  for (std::size_t t = 0; t < 8; ++t) {
    threads.emplace_back([this, t, &wrong] {
      for (std::size_t i = 0; i < 3 * kFiles; ++i) {
        const std::size_t which = (i * (t + 1)) % kFiles;
        if (content(*files_[which]) != std::to_string(which)) ++wrong;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

TEST_F(ManyFilesTest, AnotherFileUnderTheNameOfOneThatWasClosedIsAnError) {
  const std::string name = files_[0]->path();
  write("other", "0");
  fs::rename(folder_ / "other", name);
  std::vector<std::byte> bytes(1);
  const Status status = files_[0]->read_exact(0, bytes);
  ASSERT_FALSE(status.ok());
  EXPECT_EQ(status.error().code, ErrorCode::kFileChanged);
  EXPECT_TRUE(files_[0]->check_unchanged().ok());  // there is nothing of it to see
}

TEST_F(ManyFilesTest, NoDescriptorLeftIsMadeRoomFor) {
  std::vector<FileDescriptor> taken;
  while (true) {
    FileDescriptor fd(::open("/dev/null", O_RDONLY | O_CLOEXEC));
    if (fd.get() < 0) break;
    taken.push_back(std::move(fd));
    if (taken.size() > 100'000) break;  // there is no limit
  }
  for (std::size_t i = 0; i < files_.size(); ++i) EXPECT_EQ(content(*files_[i]), std::to_string(i));
}

TEST_F(IoTest, AFileWithoutANameStaysOpen) {
  const auto gone = numbered(100);
  const std::string path = "/proc/self/fd/" + std::to_string((*gone->descriptor())->get());
  const auto again = File::open(path);
  ASSERT_TRUE(again.ok());
  fs::remove(gone->path());
  std::vector<std::shared_ptr<File>> others;
  for (int i = 0; i < 300; ++i) {
    others.push_back(*File::open(write(std::to_string(i), "1").string()));
  }
  std::vector<std::byte> bytes(100);
  EXPECT_TRUE((*again)->read_exact(0, bytes).ok());
}

TEST_F(IoTest, OpeningWaitsForALeaseThatAnotherProcessHolds) {
  const auto path = write("leased", "content");
  int ready[2];
  ASSERT_EQ(::pipe(ready), 0);
  const pid_t holder = ::fork();
  if (holder == 0) {
    sigset_t asked;
    sigemptyset(&asked);
    sigaddset(&asked, SIGIO);
    ::sigprocmask(SIG_BLOCK, &asked, nullptr);
    const int fd = ::open(path.c_str(), O_RDONLY);
    const char held = ::fcntl(fd, F_SETLEASE, F_WRLCK) == 0 ? 'y' : 'n';
    if (::write(ready[1], &held, 1) != 1 || held == 'n') ::_exit(1);
    int signal = 0;
    ::sigwait(&asked, &signal);
    ::usleep(50'000);
    ::fcntl(fd, F_SETLEASE, F_UNLCK);
    ::_exit(0);
  }
  char held = 'n';
  ASSERT_EQ(::read(ready[0], &held, 1), 1);
  const auto file = File::open(path.string());
  EXPECT_TRUE(file.ok());
  int status = 0;
  ::waitpid(holder, &status, 0);
  EXPECT_TRUE(held != 'y' || status == 0);  // it was asked
  ::close(ready[0]);
  ::close(ready[1]);
}

TEST_F(IoTest, AMappingNeedsNoOpenFile) {
  const std::string content = numbers(10'000);
  auto file = numbered(content.size());
  auto mapping = Mapping::map(file);
  ASSERT_TRUE(mapping.ok());
  const int fd = (*file->descriptor())->get();
  file.reset();
  EXPECT_EQ(::fcntl(fd, F_GETFD), -1);
  EXPECT_EQ(text({(*mapping)->data(), content.size()}), content);
  EXPECT_TRUE((*mapping)->populate(0, content.size()).ok());
}

TEST_F(IoTest, AnEmptyFileHasNoMapping) {
  const auto file = File::open(write("empty", "").string());
  ASSERT_TRUE(file.ok());
  auto mapping = Mapping::map(*file);
  ASSERT_TRUE(mapping.ok());
  EXPECT_EQ((*mapping)->data(), nullptr);
  EXPECT_TRUE((*mapping)->populate(0, 0).ok());
}

TEST_F(IoTest, PopulatesPages) {
  const std::size_t size = 64 * 4096;
  const auto file = numbered(size);
  auto mapping = Mapping::map(file);
  ASSERT_TRUE(mapping.ok());
  std::byte* const data = (*mapping)->data();
  ASSERT_TRUE((*mapping)->populate(5 * 4096 + 17, 3 * 4096).ok());
  std::vector<unsigned char> in_core(64);
  ASSERT_EQ(::mincore(data, size, in_core.data()), 0);
  for (std::size_t page = 5; page <= 8; ++page) EXPECT_EQ(in_core[page] & 1, 1) << page;
  EXPECT_TRUE((*mapping)->populate(size - 1, 1).ok());
  EXPECT_TRUE((*mapping)->populate(size - 1, 1000).ok());  // no further than the file
}

TEST_F(IoTest, PopulatingATruncatedFileIsAnErrorAndNoSignal) {
  const auto file = numbered(64 * 4096);
  auto mapping = Mapping::map(file);
  ASSERT_TRUE(mapping.ok());
  ASSERT_EQ(::truncate(file->path().c_str(), 10 * 4096), 0);
  EXPECT_TRUE((*mapping)->populate(0, 10 * 4096).ok());
  const auto status = (*mapping)->populate(8 * 4096, 4 * 4096);
  ASSERT_FALSE(status.ok());
  EXPECT_EQ(status.error().code, ErrorCode::kFileShrank);
  EXPECT_EQ(status.error().path, file->path());
}

TEST_F(IoTest, PopulatingRetriesAndReports) {
  const auto file = numbered(4 * 4096);
  auto mapping = Mapping::map(file);
  ASSERT_TRUE(mapping.ok());
  int calls = 0;
  fake_advice() = [&](int) -> std::optional<int> {
    errno = ++calls % 2 != 0 ? EINTR : EAGAIN;
    return calls < 5 ? std::optional(-1) : std::nullopt;
  };
  EXPECT_TRUE((*mapping)->populate(0, 4 * 4096).ok());
  EXPECT_EQ(calls, 5);
  for (const auto& [number, expected] : {std::pair{EFAULT, EIO}, {ENOMEM, ENOMEM}}) {
    fake_advice() = [number = number](int) {
      errno = number;
      return std::optional(-1);
    };
    const auto status = (*mapping)->populate(4096, 4096);
    ASSERT_FALSE(status.ok());
    EXPECT_EQ(status.error().system_errno, expected);
    EXPECT_EQ(status.error().offset, 4096U);
  }
  // Kernels that do not know the advice, and sandboxes that refuse it.
  for (const int number : {EINVAL, EPERM, ENOSYS, EACCES, EOPNOTSUPP}) {
    fake_advice() = [number](int) {
      errno = number;
      return std::optional(-1);
    };
    const auto populated = (*mapping)->populate(0, 4 * 4096);
    ASSERT_TRUE(populated.ok());
    EXPECT_FALSE(*populated);
  }
}

// --- LeasedMapping -----------------------------------------------------------------------------

class LeaseTest : public IoTest {
 protected:
  // In a process of its own: this one's would wait for itself.
  static int opened_for_writing(const std::string& path, int flags) {
    const pid_t child = ::fork();
    if (child == 0) ::_exit(::open(path.c_str(), O_WRONLY | flags) >= 0 ? 0 : errno);
    int status = 0;
    EXPECT_EQ(::waitpid(child, &status, 0), child);
    EXPECT_TRUE(WIFEXITED(status));
    return WEXITSTATUS(status);
  }

  void SetUp() override {
    if (LeasedMapping::open(numbered(1)) == nullptr) {
      GTEST_SKIP() << "no leases on the file system of " << folder_;
    }
  }
};

TEST_F(LeaseTest, HoldsTheBytesOfTheFile) {
  const std::string expected = numbers((70 << 20) + 5);
  const auto file = numbered(expected.size());
  const auto leased = LeasedMapping::open(file);
  ASSERT_NE(leased, nullptr);
  const std::size_t step = (1 << 20) + 4099;  // over the borders of pages and of blocks
  for (std::size_t at = 0; at < expected.size(); at += step) {
    const std::size_t bytes = std::min(step, expected.size() - at);
    const auto hold = leased->hold(at, bytes);
    ASSERT_NE(hold.data(), nullptr);
    EXPECT_EQ(text({hold.data(), bytes}), expected.substr(at, bytes));
  }
  // Pages that were unmapped after use can be held again.
  EXPECT_EQ(text({leased->hold(40 << 20, 9).data(), 9}), expected.substr(40 << 20, 9));
}

TEST_F(LeaseTest, WhoWantsToWriteWaitsForTheNextHold) {
  const auto file = numbered(1 << 20);
  const auto leased = LeasedMapping::open(file);
  auto hold = std::make_optional(leased->hold(0, 100));
  ASSERT_NE(hold->data(), nullptr);
  // SIGIO, which a lease sends by default, would end this process.
  EXPECT_EQ(opened_for_writing(file->path(), O_NONBLOCK), EWOULDBLOCK);
  EXPECT_EQ(text({hold->data(), 100}), numbers(100));
  EXPECT_EQ(leased->hold(0, 100).data(), nullptr);
  // A hold still exists.
  EXPECT_EQ(opened_for_writing(file->path(), O_NONBLOCK), EWOULDBLOCK);
  hold.reset();
  EXPECT_EQ(opened_for_writing(file->path(), O_NONBLOCK), 0);
  EXPECT_EQ(leased->hold(0, 100).data(), nullptr);
}

TEST_F(LeaseTest, TheLeaseEndsWithTheMapping) {
  const auto file = numbered(4096);
  auto leased = LeasedMapping::open(file);
  EXPECT_NE(leased->hold(0, 4096).data(), nullptr);
  EXPECT_EQ(opened_for_writing(file->path(), O_NONBLOCK), EWOULDBLOCK);
  leased.reset();
  EXPECT_EQ(opened_for_writing(file->path(), O_NONBLOCK), 0);
}

TEST_F(LeaseTest, ThereIsNoneForAFileThatIsOpenForWriting) {
  const auto file = numbered(4096);
  const int writer = ::open(file->path().c_str(), O_WRONLY | O_CLOEXEC);
  EXPECT_EQ(LeasedMapping::open(file), nullptr);
  ::close(writer);
  EXPECT_NE(LeasedMapping::open(file), nullptr);
}

TEST_F(LeaseTest, ThereIsNoneWhereACallFails) {
  const auto file = numbered(1 << 20);
  for (const int failing : {F_SETSIG, F_SETLEASE, F_SETOWN}) {
    fcntl_fails() = [&](int command) { return command == failing; };
    EXPECT_EQ(LeasedMapping::open(file), nullptr) << failing;
    fcntl_fails() = nullptr;
    EXPECT_EQ(opened_for_writing(file->path(), O_NONBLOCK), 0) << failing;
  }
  const auto leased = LeasedMapping::open(file);
  fcntl_fails() = [](int command) { return command == F_GETLEASE; };
  EXPECT_EQ(leased->hold(0, 100).data(), nullptr);
  fake_advice() = [](int) {
    errno = EFAULT;
    return std::optional(-1);
  };
  fcntl_fails() = nullptr;
  EXPECT_EQ(LeasedMapping::open(file)->hold(0, 100).data(), nullptr);
}

TEST_F(LeaseTest, AFileThatWasCutOffBeforeHasNothingToHold) {
  const auto file = numbered(64 * 4096);
  ASSERT_EQ(::truncate(file->path().c_str(), 10 * 4096), 0);
  const auto leased = LeasedMapping::open(file);
  ASSERT_NE(leased, nullptr);
  EXPECT_EQ(leased->hold(8 * 4096, 4 * 4096).data(), nullptr);
  EXPECT_NE(leased->hold(8 * 4096, 2 * 4096).data(), nullptr);
}

// --- AnonymousMemory ---------------------------------------------------------------------------

TEST_F(IoTest, MemoryIsZeroAndAligned) {
  for (const std::size_t bytes : {std::size_t{1}, kPageBytes, kPageBytes + 1, kHugePageBytes - 1,
                                  kHugePageBytes, 3 * kHugePageBytes + 5}) {
    auto memory = AnonymousMemory::allocate(bytes);
    ASSERT_TRUE(memory.ok());
    EXPECT_GE(memory->size(), bytes);
    const auto address = reinterpret_cast<std::uintptr_t>(memory->data());
    EXPECT_EQ(address % (bytes >= kHugePageBytes ? kHugePageBytes : kPageBytes), 0U);
    EXPECT_TRUE(std::all_of(memory->data(), memory->data() + bytes,
                            [](std::byte byte) { return byte == std::byte{0}; }));
    std::fill_n(memory->data(), memory->size(), std::byte{1});
  }
  const auto none = AnonymousMemory::allocate(0);
  ASSERT_TRUE(none.ok());
  EXPECT_EQ(none->data(), nullptr);
}

// The addresses that this process has in use, in bytes (proc(5)). TSan alone takes terabytes.
rlim_t bytes_of_addresses() {
  rlim_t pages = 0;
  std::ifstream("/proc/self/statm") >> pages;
  return pages * static_cast<rlim_t>(::sysconf(_SC_PAGESIZE));
}

TEST_F(IoTest, TooMuchMemoryIsAnError) {
  for (const std::size_t bytes :
       {std::size_t{1} << 46, std::size_t{1} << 60, std::numeric_limits<std::size_t>::max()}) {
    const rlimit before = [] {
      rlimit limit{};
      ::getrlimit(RLIMIT_AS, &limit);
      return limit;
    }();
    rlimit lower = before;
    lower.rlim_cur = bytes_of_addresses() + (rlim_t{1} << 45);
    ASSERT_EQ(::setrlimit(RLIMIT_AS, &lower), 0);
    const auto memory = AnonymousMemory::allocate(bytes);
    ASSERT_EQ(::setrlimit(RLIMIT_AS, &before), 0);
    ASSERT_FALSE(memory.ok());
    EXPECT_EQ(memory.error().code, ErrorCode::kOutOfMemory);
    EXPECT_EQ(memory.error().system_errno, ENOMEM);
  }
}

TEST_F(IoTest, MemoryIsMovedAndFreedOnce) {
  auto first = AnonymousMemory::allocate(kPageBytes);
  auto second = AnonymousMemory::allocate(2 * kPageBytes);
  ASSERT_TRUE(first.ok() && second.ok());
  std::byte* const data = second->data();
  std::byte* const freed = first->data();
  *first = *std::move(second);
  EXPECT_EQ(first->data(), data);
  EXPECT_EQ(first->size(), 2 * kPageBytes);
  EXPECT_EQ(second->data(), nullptr);  // NOLINT(*use-after-move*): that is what is looked at
  unsigned char in_core = 0;
  EXPECT_EQ(::mincore(freed, kPageBytes, &in_core), -1);
  data[2 * kPageBytes - 1] = std::byte{1};
}

// Whether the kernel knows MADV_POPULATE_WRITE.
void fake_populate_write(bool known) {
  fake_advice() = [known](int advice) -> std::optional<int> {
    if (advice != 23 || known) return std::nullopt;
    errno = EINVAL;
    return -1;
  };
}

TEST_F(IoTest, MemoryIsPopulated) {
  for (const bool known : {true, false}) {  // to the kernel: Linux 5.14
    fake_populate_write(known);
    auto memory = AnonymousMemory::allocate(16 * kPageBytes);
    ASSERT_TRUE(memory.ok());
    memory->data()[5 * kPageBytes] = std::byte{9};  // another thread may have written it
    ASSERT_TRUE(memory->populate(4 * kPageBytes + 9, 2 * kPageBytes).ok());
    EXPECT_EQ(memory->data()[5 * kPageBytes], std::byte{9});
    std::vector<unsigned char> in_core(16);
    ASSERT_EQ(::mincore(memory->data(), 16 * kPageBytes, in_core.data()), 0);
    for (std::size_t page = 0; page < 16; ++page) {
      EXPECT_EQ(in_core[page] & 1, page >= 4 && page <= 6 ? 1 : 0) << page << known;
    }
  }
}

TEST_F(IoTest, PagesAreBackedAsAHint) {
  for (const bool known : {true, false}) {  // to the kernel: Linux 5.14
    fake_populate_write(known);
    auto memory = AnonymousMemory::allocate(16 * kPageBytes);
    ASSERT_TRUE(memory.ok());
    memory->data()[5 * kPageBytes] = std::byte{9};
    back_pages(memory->data() + 4 * kPageBytes + 9, 2 * kPageBytes);
    EXPECT_EQ(memory->data()[5 * kPageBytes], std::byte{9});
    for (std::size_t page = 0; page < 16; ++page) {
      const bool touched = page == 5 || (known && page >= 4 && page <= 6);
      EXPECT_EQ(memory->is_backed(page * kPageBytes), touched) << page << known;
    }
  }
}

TEST_F(IoTest, ReleasesWholePagesAndNothingAround) {
  auto memory = AnonymousMemory::allocate(8 * kPageBytes);
  ASSERT_TRUE(memory.ok());
  std::byte* const data = memory->data();
  const auto kept = [&](std::size_t at) { return data[at] == std::byte{9}; };
  for (const auto& [begin, end, first, last] : {
           std::tuple{kPageBytes - 1, 3 * kPageBytes + 1, kPageBytes, 3 * kPageBytes},
           std::tuple{kPageBytes, 3 * kPageBytes, kPageBytes, 3 * kPageBytes},
           std::tuple{kPageBytes + 1, 2 * kPageBytes - 1, std::size_t{0}, std::size_t{0}},
           std::tuple{kPageBytes + 1, 3 * kPageBytes - 1, std::size_t{0}, std::size_t{0}},
           std::tuple{kPageBytes, kPageBytes, std::size_t{0}, std::size_t{0}},
           std::tuple{kPageBytes + 5, kPageBytes + 5, std::size_t{0}, std::size_t{0}},
       }) {
    std::fill_n(data, 8 * kPageBytes, std::byte{9});
    release_whole_pages(data + begin, end - begin);
    for (std::size_t at = 0; at < 8 * kPageBytes; ++at) {
      ASSERT_EQ(kept(at), at < first || at >= last) << begin << ' ' << end << ' ' << at;
    }
  }
}

// --- Residency ---------------------------------------------------------------------------------

TEST_F(IoTest, TellsWhatIsInThePageCache) {
  const std::size_t size = 64 * kPageBytes;
  const auto file = numbered(size);
  if (!resident_bytes(*file, 0, size)) {
    EXPECT_FALSE(resident_share(*file, 0, size).share);  // Linux before 6.5
    return;
  }
  EXPECT_EQ(resident_bytes(*file, 0, size), size);
  EXPECT_EQ(resident_bytes(*file, 10, 100), 100U);
  EXPECT_EQ(resident_bytes(*file, 0, 0), 0U);
  EXPECT_EQ(resident_share(*file, 0, size).share, 1.0);
  drop_from_page_cache(*file);
  const auto left = resident_bytes(*file, 0, size);
  ASSERT_TRUE(left);
  if (*left == size) return;  // a file system in memory
  EXPECT_EQ(*left, 0U);
  EXPECT_EQ(resident_share(*file, 0, size).share, 0.0);
  std::vector<std::byte> one(1);
  ASSERT_TRUE(file->read_exact(0, one).ok());
  EXPECT_GE(*resident_bytes(*file, 0, size), kPageBytes);
}

TEST_F(IoTest, ResidencyOfAFileThatIsHalfThere) {
  const fs::path path = write("sparse", "");
  fs::resize_file(path, std::size_t{1} << 30);  // all hole, nothing cached
  const auto file = File::open(path.string());
  ASSERT_TRUE(file.ok());
  const auto share = resident_share(**file, 0, (*file)->size()).share;
  if (!share) return;  // Linux before 6.5
  EXPECT_EQ(*share, 0.0);
  std::vector<std::byte> some(std::size_t{8} << 20);
  for (std::size_t at = 0; at < (std::size_t{64} << 20); at += some.size()) {
    ASSERT_TRUE((*file)->read_exact(at, some).ok());
  }
  EXPECT_EQ(resident_share(**file, 0, std::size_t{64} << 20).share, 1.0);
  EXPECT_LT(*resident_share(**file, 0, (*file)->size()).share, 0.5);
}

// --- Machine -----------------------------------------------------------------------------------

class MachineTest : public IoTest {
 protected:
  static unsigned affinity() {
    cpu_set_t set;
    CPU_ZERO(&set);
    EXPECT_EQ(::sched_getaffinity(0, sizeof set, &set), 0);
    return static_cast<unsigned>(CPU_COUNT(&set));
  }
  void available(std::uint64_t kib) const {
    write("proc/meminfo", "MemTotal:       99999999 kB\nMemAvailable:   " + std::to_string(kib) +
                              " kB\nBuffers: 1 kB\n");
  }
  [[nodiscard]] unsigned cpus() const { return usable_cpus(folder_.string()); }
  [[nodiscard]] std::uint64_t headroom() const { return memory_headroom(folder_.string()); }
};

TEST_F(MachineTest, WithoutACgroupTheMachineIsTheLimit) {
  EXPECT_EQ(cpus(), affinity());
  EXPECT_EQ(headroom(), std::numeric_limits<std::uint64_t>::max());
  available(1000);
  EXPECT_EQ(headroom(), 1'024'000U);
}

TEST_F(MachineTest, TheRealOneHasSome) {
  EXPECT_GE(usable_cpus(), 1U);
  EXPECT_LE(usable_cpus(), affinity());
  EXPECT_GT(memory_headroom(), 1U << 20);
  EXPECT_LT(memory_headroom(), std::uint64_t{1} << 50);
}

TEST_F(MachineTest, HugePagesByTheSettingOfTheMachine) {
  EXPECT_TRUE(gives_huge_pages(folder_.string()));  // unknown
  const std::string setting = "sys/kernel/mm/transparent_hugepage/enabled";
  for (const auto& [text, gives] : {std::pair{"always madvise [never]\n", false},
                                    {"always [madvise] never\n", true},
                                    {"[always] madvise never\n", true}}) {
    write(setting, text);
    EXPECT_EQ(gives_huge_pages(folder_.string()), gives) << text;
  }
}

TEST_F(MachineTest, QuotaOfVersionTwo) {
  write("proc/self/cgroup", "0::/app/worker\n");
  const std::string group = "sys/fs/cgroup/app/worker/cpu.max";
  write(group, "max 100000\n");
  EXPECT_EQ(cpus(), affinity());
  write(group, "100000 100000\n");
  EXPECT_EQ(cpus(), 1U);
  write(group, "10000 100000\n");  // a tenth is still one
  EXPECT_EQ(cpus(), 1U);
  write(group, "150000 100000\n");  // one and a half keep two busy
  EXPECT_EQ(cpus(), std::min(affinity(), 2U));
  write(group, "99900000 100000\n");
  EXPECT_EQ(cpus(), affinity());
  write("sys/fs/cgroup/app/cpu.max", "100000 100000\n");  // a parent's binds too
  EXPECT_EQ(cpus(), 1U);
  write("sys/fs/cgroup/app/cpu.max", "nonsense\n");
  EXPECT_EQ(cpus(), affinity());
}

TEST_F(MachineTest, QuotaOfVersionOne) {
  write("proc/self/cgroup", "5:memory:/box\n4:cpu,cpuacct:/box\n1:name=systemd:/box\n");
  write("sys/fs/cgroup/cpu/box/cpu.cfs_quota_us", "-1\n");
  write("sys/fs/cgroup/cpu/box/cpu.cfs_period_us", "100000\n");
  EXPECT_EQ(cpus(), affinity());
  write("sys/fs/cgroup/cpu/box/cpu.cfs_quota_us", "50000\n");
  EXPECT_EQ(cpus(), 1U);
}

TEST_F(MachineTest, AContainersGroupIsTheRootOfTheMount) {
  // /proc has the host's path, which does not exist in the container's mount.
  write("proc/self/cgroup", "0::/docker/0123456789abcdef\n");
  write("sys/fs/cgroup/cpu.max", "100000 100000\n");
  write("sys/fs/cgroup/memory.max", "1000000\n");
  write("sys/fs/cgroup/memory.current", "400000\n");
  EXPECT_EQ(cpus(), 1U);
  EXPECT_EQ(headroom(), 600'000U);
  write("proc/self/cgroup", "0::/../../other\n");
  EXPECT_EQ(headroom(), 600'000U);
  write("proc/self/cgroup", "0::/\n");
  EXPECT_EQ(headroom(), 600'000U);
}

TEST_F(MachineTest, PagesOfFilesCountAsFree) {
  available(1'000'000);
  write("proc/self/cgroup", "0::/app\n");
  write("sys/fs/cgroup/app/memory.max", "1000000\n");
  write("sys/fs/cgroup/app/memory.current", "990000\n");
  EXPECT_EQ(headroom(), 10'000U);
  write("sys/fs/cgroup/app/memory.stat",
        "anon 100000\nfile 850000\ninactive_anon 5\ninactive_file 600000\nactive_file 250000\n");
  EXPECT_EQ(headroom(), 860'000U);
  write("sys/fs/cgroup/app/memory.stat", "inactive_file 99999999\n");  // counted at another time
  EXPECT_EQ(headroom(), 1'000'000U);
  write("sys/fs/cgroup/app/memory.stat", "");
  write("sys/fs/cgroup/app/memory.current", "1000001\n");
  EXPECT_EQ(headroom(), 0U);
  write("sys/fs/cgroup/app/memory.max", "max\n");
  EXPECT_EQ(headroom(), 1'024'000'000U);
}

TEST_F(MachineTest, TheTightestOfNestedLimitsBinds) {
  available(1'000'000);
  write("proc/self/cgroup", "0::/a/b/c\n");
  for (const auto& [group, limit, used] :
       {std::tuple{"a", 900'000, 100'000}, {"a/b", 500'000, 450'000}, {"a/b/c", 400'000, 10'000}}) {
    const std::string path = std::string("sys/fs/cgroup/") + group;
    write(path + "/memory.max", std::to_string(limit));
    write(path + "/memory.current", std::to_string(used));
  }
  EXPECT_EQ(headroom(), 50'000U);
}

TEST_F(MachineTest, MemoryOfVersionOne) {
  available(1'000'000);
  write("proc/self/cgroup", "9:memory:/box\n4:cpu,cpuacct:/other\n");
  const std::string group = "sys/fs/cgroup/memory/box/";
  write(group + "memory.limit_in_bytes", "9223372036854771712\n");  // none
  write(group + "memory.usage_in_bytes", "5000\n");
  EXPECT_EQ(headroom(), 1'024'000'000U);
  write(group + "memory.limit_in_bytes", "100000\n");
  EXPECT_EQ(headroom(), 95'000U);
  write(group + "memory.stat", "cache 9\ninactive_file 2000\nactive_file 1000\n");
  EXPECT_EQ(headroom(), 98'000U);
  // Usage counts the groups below as well; so do the fields that say total.
  write(group + "memory.stat",
        "inactive_file 0\nactive_file 0\ntotal_inactive_file 2000\ntotal_active_file 1000\n");
  EXPECT_EQ(headroom(), 98'000U);
}

TEST_F(MachineTest, NoMemoryLeftIsNotUnlimited) {
  available(0);
  EXPECT_EQ(headroom(), 0U);
}

TEST_F(MachineTest, LinesThatMakeNoSense) {
  available(1000);
  for (const char* const lines :
       {"", "\n", "::", "0:", "nonsense", "0::", "0::relative", "a:b:c:d"}) {
    write("proc/self/cgroup", lines);
    EXPECT_EQ(headroom(), 1'024'000U) << lines;
    EXPECT_EQ(cpus(), affinity()) << lines;
  }
}

}  // namespace
}  // namespace weightlift::io
