// Converts a pickle of torch.save to Python objects.
#pragma once

#include <pybind11/pybind11.h>

namespace weightlift::bind {

// Returns the pickle's dict and a dict from record to the storage's bytes; None if torch's own
// unpickler must read it. A tensor becomes `tensor(record, dtype, offset, shape, stride,
// contiguous)`, as in format::PickledTensor. A list or tuple has only as many entries as it has
// tensors, all of them one of these.
[[nodiscard]] pybind11::object torch_pickle(const pybind11::bytes& pickle,
                                            const pybind11::object& tensor);

}  // namespace weightlift::bind
