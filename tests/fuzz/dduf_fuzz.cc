// DDUF files: the archive, and the safetensors files that are read inside it.

#include "safetensors_file.h"
#include "zip_file.h"

namespace weightlift::fuzz {
namespace {

constexpr auto kNames = std::to_array<std::string_view>(
    {"model_index.json", "unet/config.json", "unet/model.safetensors", "vae/a.safetensors",
     "b.safetensors", "unet/", "../x.json", "unet/\xc3\xa9.txt", "/", "unet/deep/x.model"});

// The same tensors as in a separate file, each moved by the offset of the entry.
void check_entry(std::string_view file, const format::ZipRecord& record) {
  const std::string_view entry = bytes_of(file, record);
  check_safetensors(entry);
  const auto alone = parse_safetensors(entry);
  const auto inside = parse_safetensors(entry, record.begin);
  WL_REQUIRE(alone.ok() == inside.ok());
  if (!alone.ok()) {
    WL_REQUIRE(alone.error().code == inside.error().code);
    WL_REQUIRE(alone.error().tensor == inside.error().tensor);
    WL_REQUIRE(alone.error().offset.has_value() == inside.error().offset.has_value());
    WL_REQUIRE(!alone.error().offset ||
               *alone.error().offset + record.begin == *inside.error().offset);
    return;
  }
  const auto theirs = (*alone)->tensors();
  const auto ours = (*inside)->tensors();
  WL_REQUIRE(ours.size() == theirs.size());
  for (std::size_t i = 0; i < ours.size(); ++i) {
    WL_REQUIRE(ours[i].name == theirs[i].name && ours[i].bytes == theirs[i].bytes);
    WL_REQUIRE(ours[i].begin == theirs[i].begin + record.begin);
    WL_REQUIRE(ours[i].begin + ours[i].bytes <= record.begin + record.bytes);
  }
}

void mutate_record(const std::string& name, std::string& data, Random& random) {
  if (name.ends_with(".safetensors")) {
    data = mutate_safetensors(data, random);
  } else {
    mutate_bytes(data);
  }
}

}  // namespace
}  // namespace weightlift::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace weightlift;
  const std::string_view file = fuzz::as_text(data, size);
  for (const format::ZipRecord& record : fuzz::check_archive(file)) {
    if (record.name.ends_with(".safetensors")) fuzz::check_entry(file, record);
  }
  return 0;
}

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size,
                                               std::size_t max_size, unsigned seed) {
  using namespace weightlift::fuzz;
  Random random(seed);
  const std::string other = mutate_archive(as_text(data, size), random, kNames, mutate_record);
  return hand_back(other, data, size, max_size);
}
