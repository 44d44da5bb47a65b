// The files of a load: how each is read and why, what of its mapping is read in, and the reads.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "engine/io_path.h"
#include "engine/plan.h"
#include "engine/schedule.h"
#include "engine/settings.h"
#include "io/anonymous_memory.h"
#include "io/file.h"
#include "result.h"

namespace weightlift::engine {

// A thread's own buffer for bytes between a file and where they go.
class Scratch {
 public:
  [[nodiscard]] Result<std::byte*> get(std::size_t bytes);

 private:
  io::AnonymousMemory memory_;
};

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

  // What must be read in of the mappings, in this order and one at a time.
  [[nodiscard]] const std::vector<PopulateStep>& populate_steps() const noexcept { return steps_; }
  [[nodiscard]] Status populate(const PopulateStep& step) const;

  // Reads a unit to `target`, or into `scratch` where that is null; returns where. Any thread.
  [[nodiscard]] Result<const std::byte*> read(const Unit& unit, std::byte* target,
                                              Scratch& scratch);

  // For the report, when no thread reads any more.
  [[nodiscard]] IoRoute route(std::size_t file) const noexcept;
  [[nodiscard]] const std::string& reason(std::size_t file) const {
    return files_[file].choice.reason;
  }
  [[nodiscard]] std::vector<std::string> fallbacks() const;

 private:
  struct Source {
    IoChoice choice;
    std::unique_ptr<io::DirectFile> direct;
    std::atomic<bool> direct_refused{false};
    std::string refusal;  // written by the one thread that sets direct_refused, or before any
  };

  void choose_routes(const Settings& settings);
  void plan_populate();
  [[nodiscard]] std::vector<PopulateStep> mapped_ranges() const;
  void note(const std::vector<PopulateStep>& ranges, const char* text);

  const LoadPlan& plan_;
  std::deque<Source> files_;
  std::vector<PopulateStep> steps_;
};

}  // namespace weightlift::engine
