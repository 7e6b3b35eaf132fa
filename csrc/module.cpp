// The Python module with the operators, whose name the build gives (setup.py). Importing it loads the library, and with it every
// TORCH_LIBRARY_FRAGMENT of the other files here registers its operators in `torch.ops.dwrl_fast`; the module itself is empty.

#include <Python.h>

#define DWRL_FAST_INIT_OF(name) PyInit_##name
#define DWRL_FAST_INIT(name) DWRL_FAST_INIT_OF(name)
#define DWRL_FAST_TEXT_OF(name) #name
#define DWRL_FAST_TEXT(name) DWRL_FAST_TEXT_OF(name)

PyMODINIT_FUNC DWRL_FAST_INIT(TORCH_EXTENSION_NAME)(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, DWRL_FAST_TEXT(TORCH_EXTENSION_NAME), "Operators of dwrl_fast, in torch.ops.dwrl_fast.", -1, nullptr};
  return PyModule_Create(&definition);
}
