// The files of a load: how each is read and why, what of its mapping is read in, and the reads.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "engine/io_path.h"
#include "engine/plan.h"
#include "engine/schedule.h"
#include "engine/scratch.h"
#include "engine/settings.h"
#include "io/file.h"
#include "io/leased_mapping.h"
#include "result.h"

namespace weightlift::engine {

// A part of a mapping that is read in at once: between two of them a cancel is noticed.
struct PopulateStep {
  std::uint32_t file = 0;
  std::uint32_t name = 0;
  std::uint64_t offset = 0;
  std::uint64_t bytes = 0;
  std::uint64_t payload = 0;  // of these, tensors
};

class Sources {
 public:
  // Looks at what of the files is resident. `plan` must live as long.
  Sources(const LoadPlan& plan, const Settings& settings);

  // Whether some file comes from its disk: more reads in flight then pay off.
  [[nodiscard]] bool cold() const noexcept;
  // Whether some file is read past the page cache.
  [[nodiscard]] bool reads_directly() const noexcept;

  // What must be read in of the mappings, in this order and one at a time.
  [[nodiscard]] const std::vector<PopulateStep>& populate_steps() const noexcept { return steps_; }
  [[nodiscard]] Status populate(const PopulateStep& step) const;
  // Of each name, how many of the steps must be done before all of it has been read in.
  [[nodiscard]] std::vector<std::uint32_t> steps_by_name() const;

  // Reads a unit to `target`. Any thread.
  [[nodiscard]] Status read(const Unit& unit, std::byte* target, Scratch& scratch);

  // The bytes of a unit where they lie in the page cache, or none where that cannot be. Any thread.
  [[nodiscard]] io::LeasedMapping::Hold hold(const Unit& unit);

  // The bytes of a unit, read into `scratch`; of one that is cast, where they lie in the page
  // cache, if that can be. Any thread.
  struct Bytes {
    const std::byte* data = nullptr;
    io::LeasedMapping::Hold hold;
  };
  [[nodiscard]] Result<Bytes> bytes(const Unit& unit, bool is_cast, Scratch& scratch);

  // When no thread reads any more: whoever wants to write to the files need not wait for the rest.
  void release() noexcept;

  // For the report, when no thread reads any more.
  [[nodiscard]] IoRoute route(std::size_t file) const noexcept;
  [[nodiscard]] const std::string& reason(std::size_t file) const {
    return files_[file].choice.reason;
  }
  [[nodiscard]] std::vector<std::string> fallbacks() const;

 private:
  struct Source {
    IoChoice choice;
    bool may_lease = false;
    std::once_flag asked_for_lease;
    std::unique_ptr<io::LeasedMapping> leased;
    std::unique_ptr<io::DirectFile> direct;
    std::atomic<bool> direct_refused{false};
    std::string refusal;  // written by the one thread that sets direct_refused, or before any
  };

  [[nodiscard]] Result<const std::byte*> read_to(const Unit& unit, std::byte* target,
                                                 Scratch& scratch);
  void choose_routes(const Settings& settings);
  void plan_populate();
  [[nodiscard]] std::vector<PopulateStep> mapped_ranges() const;
  void note(const std::vector<PopulateStep>& ranges, const char* text);

  const LoadPlan& plan_;
  std::deque<Source> files_;
  std::vector<PopulateStep> steps_;
};

}  // namespace weightlift::engine
