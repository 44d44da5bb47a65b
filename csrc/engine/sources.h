// The files of a load: how each is read and why, the populate steps of its mapping, and the reads.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "engine/io_path.h"
#include "engine/page_choice.h"
#include "engine/plan.h"
#include "engine/schedule.h"
#include "engine/scratch.h"
#include "engine/settings.h"
#include "io/file.h"
#include "io/leased_mapping.h"
#include "result.h"

namespace weightlift::engine {

// A part of a mapping that one call reads in. A cancel takes effect between two of them.
struct PopulateStep {
  std::uint32_t file = 0;
  std::uint32_t name = 0;
  std::uint64_t offset = 0;
  std::uint64_t bytes = 0;
  std::uint64_t payload = 0;  // bytes of tensors in it
};

class Sources {
 public:
  // Finds out how much of each file is resident. `plan` must live as long as this object. Tests
  // pass `read_page` to set what the first touch of a page costs.
  Sources(const LoadPlan& plan, const Settings& settings, ReadPage read_page = nullptr);
  Sources(const Sources&) = delete;
  Sources& operator=(const Sources&) = delete;
  ~Sources() { release(); }

  // Whether a file comes from the disk: then more reads in flight are faster.
  [[nodiscard]] bool cold() const noexcept;
  // Whether a file is read with direct I/O.
  [[nodiscard]] bool reads_directly() const noexcept;
  // Whether this file is, until a read is refused. Any thread.
  [[nodiscard]] bool reads_directly(std::uint32_t file) const noexcept;

  // The parts of mappings that must be read in, in this order and one at a time.
  [[nodiscard]] const std::vector<PopulateStep>& populate_steps() const noexcept { return steps_; }
  [[nodiscard]] Status populate(const PopulateStep& step);
  // For each name, the number of steps that must be done before all of it has been read in.
  [[nodiscard]] std::vector<std::uint32_t> steps_by_name() const;

  // Reads a unit to `target`. Any thread.
  [[nodiscard]] Status read(const Unit& unit, std::byte* target, Scratch& scratch);

  // Holds a unit's bytes in the page cache. Without data if that is impossible. Any thread.
  [[nodiscard]] io::LeasedMapping::Hold hold(const Unit& unit);

  // The bytes of a unit: in the page cache, if the unit is cast and they can be held there; else
  // read into `scratch`. Any thread.
  struct Bytes {
    const std::byte* data = nullptr;
    io::LeasedMapping::Hold hold;
  };
  [[nodiscard]] Result<Bytes> bytes(const Unit& unit, bool is_cast, Scratch& scratch);

  // When no thread reads any more: returns the leases, so that writers of the files need not wait
  // longer, and the mappings' advice.
  void release() noexcept;

  // For the report. Only when no thread reads any more.
  [[nodiscard]] IoRoute route(std::size_t file) const noexcept;
  [[nodiscard]] const std::string& reason(std::size_t file) const {
    return files_[file].choice.reason;
  }
  [[nodiscard]] std::vector<std::string> fallbacks() const;

 private:
  struct Source {
    IoChoice choice;
    bool may_lease = false;
    bool is_populated = false;    // its mapping reads forwards until the load ends
    bool watches_folios = false;  // reads in large folios until they arrive slowly
    bool was_slow = false;        // the last step of them
    std::once_flag asked_for_lease;
    std::unique_ptr<io::LeasedMapping> leased;
    std::unique_ptr<io::DirectFile> direct;
    std::atomic<bool> direct_refused{false};
    std::string refusal;  // written by the thread that sets direct_refused, or before threads start
  };

  [[nodiscard]] Result<const std::byte*> read_to(const Unit& unit, std::byte* target,
                                                 Scratch& scratch);
  void choose_routes(const Settings& settings);
  void plan_populate(const Settings& settings);
  [[nodiscard]] std::vector<PopulateStep> mapped_ranges() const;
  void note(const std::vector<PopulateStep>& ranges, const char* text);
  void watch_large_folios(const PopulateStep& step);

  const LoadPlan& plan_;
  std::deque<Source> files_;
  std::vector<PopulateStep> steps_;
  ReadPage read_page_;
};

}  // namespace weightlift::engine
