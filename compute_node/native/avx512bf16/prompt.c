#if defined(__x86_64__)
#include "tiles.h"

#define THREAD __attribute__((target(TARGET))) static
#define ENTRY_OF_FOLDER

#include "../prompt.h"

#endif
