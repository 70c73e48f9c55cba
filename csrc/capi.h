// What the C interface hands out as an engine.
#pragma once

#include "engine/engine.h"

struct pie_engine {
  pie::Engine engine;
};
