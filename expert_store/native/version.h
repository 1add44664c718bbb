/* Of the sources beside this file: tests/expert_store/native/test_binding.py says what it has to be,
 * and expert_store/native/binding.py, which has the same number, takes no library of another. */
#define READS_VERSION 0x5fc3fdde4c0c3837
