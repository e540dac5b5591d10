// isa.h - the instruction sets this build has and this machine runs (isa.cpp), as bindings.cpp
// shows them.
#pragma once
#include <string>
#include <vector>

namespace iv2::cpu {
std::vector<std::string> built_isas();      // narrowest first
std::vector<std::string> available_isas();  // those of built_isas() that this machine runs
std::string isa();                          // the one in use
void set_isa(const std::string& name);      // throws std::invalid_argument on a name not available
}  // namespace iv2::cpu
