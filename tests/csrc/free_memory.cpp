// Prints how much memory there is to take, under a root that stands for "/".
//
//   free_memory ROOT
#include "drivers/free_memory.h"

#include <cstdio>

int main(int count, char** arguments) {
  std::printf("%ld\n", static_cast<long>(pie::free_memory(count > 1 ? arguments[1] : "")));
  return 0;
}
