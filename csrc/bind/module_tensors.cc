#include "bind/module_tensors.h"

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace weightlift::bind {
namespace {

py::object stolen(PyObject* object) {
  if (object == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}

py::object borrowed(PyObject* object) {
  return py::reinterpret_borrow<py::object>(object);
}

void append(const py::list& list, const py::object& item) {
  if (PyList_Append(list.ptr(), item.ptr()) != 0) throw py::error_already_set();
}

bool is_true(const py::object& object) {
  const int truth = PyObject_IsTrue(object.ptr());
  if (truth < 0) throw py::error_already_set();
  return truth != 0;
}

py::object joined(const py::object& prefix, const py::object& text) {
  return stolen(PyUnicode_Concat(prefix.ptr(), text.ptr()));
}

// The name of an attribute.
class Name {
 public:
  explicit Name(const char* text) : text_(stolen(PyUnicode_InternFromString(text))) {}

  // The attribute of an object with this dict. torch.nn.Module has a __getattr__, which makes the
  // usual access slow, also to what the dict has.
  [[nodiscard]] py::object of(const py::object& object, const py::object& dict) const {
    PyObject* const found = PyDict_GetItemWithError(dict.ptr(), text_.ptr());
    if (found != nullptr) return borrowed(found);
    if (PyErr_Occurred() != nullptr) throw py::error_already_set();
    return stolen(PyObject_GetAttr(object.ptr(), text_.ptr()));
  }

 private:
  py::object text_;
};

// Calls visit(key, value) for all that is not None in a mapping. `visit` must not change it.
template <class Visit>
void for_each_item(const py::object& mapping, const Visit& visit) {
  if (PyDict_CheckExact(mapping.ptr())) {
    PyObject* key = nullptr;
    PyObject* value = nullptr;
    for (Py_ssize_t at = 0; PyDict_Next(mapping.ptr(), &at, &key, &value) != 0;) {
      if (value != Py_None) visit(borrowed(key), borrowed(value));
    }
    return;
  }
  // Of a subclass, such as OrderedDict, only its own items() knows the order.
  for (const py::handle item : py::list(mapping.attr("items")())) {
    const auto [key, value] = py::cast<std::pair<py::object, py::object>>(item);
    if (!value.is_none()) visit(key, value);
  }
}

// The index of each tensor, in one block of memory: std::unordered_map allocates for each.
class Indices {
 public:
  // The tensor's index, and whether it is new; it then gets the next one.
  std::pair<std::size_t, bool> insert(const PyObject* tensor) {
    if (2 * (count_ + 1) > slots_.size()) grow();
    Slot& slot = find(tensor);
    if (slot.tensor != nullptr) return {slot.index, false};
    slot = {tensor, count_};
    return {count_++, true};
  }

 private:
  struct Slot {
    const PyObject* tensor = nullptr;
    std::size_t index = 0;
  };

  // The slot of the tensor, or the empty one for it. The number of slots is a power of two.
  Slot& find(const PyObject* tensor) {
    const std::size_t hash = std::bit_cast<std::uintptr_t>(tensor) / alignof(std::max_align_t);
    std::size_t at = hash;
    while (true) {
      Slot& slot = slots_[at & (slots_.size() - 1)];
      if (slot.tensor == nullptr || slot.tensor == tensor) return slot;
      ++at;
    }
  }

  void grow() {
    constexpr std::size_t kFirst = 64;
    const std::vector<Slot> old =
        std::exchange(slots_, std::vector<Slot>(std::max(kFirst, 4 * slots_.size())));
    for (const Slot& slot : old) {
      if (slot.tensor != nullptr) find(slot.tensor) = slot;
    }
  }

  std::vector<Slot> slots_;
  std::size_t count_ = 0;
};

class Gathering {
 public:
  explicit Gathering(const py::object& plain_setattr) : plain_setattr_(plain_setattr) {}

  py::tuple operator()(const py::object& model) {
    waiting_.push_back({py::str(), model, 0});
    while (!waiting_.empty()) {
      const Waiting next = std::move(waiting_.back());
      waiting_.pop_back();
      parents_.resize(next.depth);
      // A module may lie below itself, such as one that keeps its parent as an attribute.
      if (std::ranges::find(parents_, next.module.ptr()) != parents_.end()) continue;
      parents_.push_back(next.module.ptr());
      visit(next.prefix, next.module);
    }
    return py::make_tuple(py::make_tuple(tensors_, are_parameters_, persistent_, names_,
                                         modules_of_tensors_, keys_, held_by_),
                          ties_, modules_, classes_, has_load_hooks_);
  }

 private:
  struct Waiting {
    py::object prefix;
    py::object module;
    std::size_t depth = 0;
  };

  void visit(const py::object& prefix, const py::object& module) {
    constexpr std::size_t kModulesBetweenSignals = 4096;
    append(modules_, module);
    if (py::len(modules_) % kModulesBetweenSignals == 0 && PyErr_CheckSignals() != 0) {
      throw py::error_already_set();
    }
    const bool is_plain = assigns_plainly(module);
    const py::object dict = stolen(PyObject_GenericGetDict(module.ptr(), nullptr));
    has_load_hooks_ = has_load_hooks_ || is_true(pre_hooks_.of(module, dict)) ||
                      is_true(post_hooks_.of(module, dict));
    const py::object parameters = parameters_.of(module, dict);
    for_each_item(parameters, [&](const py::object& key, const py::object& tensor) {
      add({prefix, module, key, is_plain ? parameters : none_}, tensor, true, true);
    });
    const py::object buffers = buffers_.of(module, dict);
    if (is_true(buffers)) {
      const py::object unsaved = unsaved_.of(module, dict);
      for_each_item(buffers, [&](const py::object& key, const py::object& tensor) {
        add({prefix, module, key, is_plain ? buffers : none_}, tensor, false,
            !unsaved.contains(key));
      });
    }
    const std::size_t first = waiting_.size();
    for_each_item(children_.of(module, dict), [&](const py::object& key, const py::object& child) {
      waiting_.push_back({joined(joined(prefix, key), dot_), child, parents_.size()});
    });
    std::reverse(waiting_.begin() + static_cast<std::ptrdiff_t>(first), waiting_.end());
  }

  struct Place {
    const py::object& prefix;
    const py::object& module;
    const py::object& key;
    const py::object& held_by;
  };

  void add(const Place& place, const py::object& tensor, bool is_parameter, bool is_persistent) {
    const py::object name = joined(place.prefix, place.key);
    const auto [index, is_new] = indices_.insert(tensor.ptr());
    if (!is_new) {
      append(ties_, py::make_tuple(index, name, place.module, place.key));
      if (is_persistent) persistent_[index] = py::bool_(true);
      return;
    }
    append(tensors_, tensor);
    append(are_parameters_, py::bool_(is_parameter));
    append(persistent_, py::bool_(is_persistent));
    append(names_, name);
    append(modules_of_tensors_, place.module);
    append(keys_, place.key);
    append(held_by_, place.held_by);
  }

  // Whether the module's class has the given __setattr__. Asks each class once.
  bool assigns_plainly(const py::object& module) {
    const auto [known, is_new] = known_classes_.try_emplace(Py_TYPE(module.ptr()), false);
    if (is_new) {
      const py::type kind = py::type::of(module);
      classes_.add(kind);
      const py::object setattr = kind.attr("__setattr__");
      known->second = setattr.is(plain_setattr_);
    }
    return known->second;
  }

  const Name pre_hooks_{"_load_state_dict_pre_hooks"};
  const Name post_hooks_{"_load_state_dict_post_hooks"};
  const Name parameters_{"_parameters"};
  const Name buffers_{"_buffers"};
  const Name unsaved_{"_non_persistent_buffers_set"};
  const Name children_{"_modules"};
  const py::object dot_ = py::str(".");
  const py::object none_ = py::none();
  std::vector<Waiting> waiting_;                           // the next one last
  std::vector<PyObject*> parents_;                         // of the next one, kept by modules_
  Indices indices_;                                        // of the tensors, kept by tensors_
  std::unordered_map<PyTypeObject*, bool> known_classes_;  // kept by classes_
  const py::object& plain_setattr_;
  py::list tensors_;
  py::list are_parameters_;
  py::list persistent_;
  py::list names_;
  py::list modules_of_tensors_;
  py::list keys_;
  py::list held_by_;
  py::list ties_;
  py::list modules_;
  py::set classes_;
  bool has_load_hooks_ = false;
};

}  // namespace

py::tuple module_tensors(const py::object& model, const py::object& plain_setattr) {
  return Gathering(plain_setattr)(model);
}

}  // namespace weightlift::bind
