/* Of the sources beside this file: tests/compute_node/native/test_binding.py says what it has to be,
 * and compute_node/native/binding.py, which has the same number, takes no library of another. */
#define KERNELS_VERSION 0x26cb50a9b7c0bc13
