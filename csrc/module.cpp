// The Python module `dwrl_fast._C`. Importing it loads the library, and with it every TORCH_LIBRARY_FRAGMENT of the other files
// here registers its operators in `torch.ops.dwrl_fast`; the module itself is empty.

#include <Python.h>

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", "Operators of dwrl_fast, in torch.ops.dwrl_fast.", -1, nullptr};
  return PyModule_Create(&definition);
}
