// What torch.save pickled, as Python's own objects.
#pragma once

#include <pybind11/pybind11.h>

namespace weightlift::bind {

// The dict in a pickle, and record -> bytes of the storages of its tensors; None where torch's own
// unpickler must read it. A tensor becomes `tensor(record, dtype, offset, shape, stride,
// contiguous)`, as in format::PickledTensor; a list or a tuple an empty one.
[[nodiscard]] pybind11::object torch_pickle(const pybind11::bytes& pickle,
                                            const pybind11::object& tensor);

}  // namespace weightlift::bind
