// A queue that allocates only in its constructor.
#pragma once

#include <cstddef>
#include <vector>

namespace weightlift::engine {

// First in, first out; holds at most `capacity` items.
template <class T>
class BoundedQueue {
 public:
  explicit BoundedQueue(std::size_t capacity) : items_(capacity) {}

  [[nodiscard]] bool empty() const noexcept { return size_ == 0; }
  [[nodiscard]] std::size_t size() const noexcept { return size_; }
  [[nodiscard]] const T& front() const { return items_[first_]; }
  // The item `index` places after the first.
  [[nodiscard]] const T& at(std::size_t index) const {
    return items_[(first_ + index) % items_.size()];
  }

  void push(T item) { items_[(first_ + size_++) % items_.size()] = item; }
  T pop() {
    T item = items_[first_];
    first_ = (first_ + 1) % items_.size();
    --size_;
    return item;
  }

 private:
  std::vector<T> items_;
  std::size_t first_ = 0;
  std::size_t size_ = 0;
};

}  // namespace weightlift::engine
