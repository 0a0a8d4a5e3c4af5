// The statistics that an op reduces its tokens to: a struct of doubles, x[], each with a name.
#pragma once

#include <vector>

// Inside a struct: FPG_STATISTICS(count, weight, loss) makes x[3], and x[weight] is the second.
#define FPG_STATISTICS(...)                           \
  enum Field { __VA_ARGS__, kFields };                \
  static constexpr const char* kNames = #__VA_ARGS__; \
  double x[kFields];

namespace fpg {

// All statistics of this extension. fastpg/ops/common/stats.py compares their names with its own.
struct StatisticsNames {
  const char* kind;   // the name of the class in Python
  const char* names;  // of the statistics, separated by commas

  static std::vector<StatisticsNames>& all() {
    static std::vector<StatisticsNames> kinds;
    return kinds;
  }
};

inline bool bind_statistics(const char* kind, const char* names) {
  StatisticsNames::all().push_back({kind, names});
  return true;
}

}  // namespace fpg

#define FPG_BIND_STATISTICS(Kind) \
  const bool bound_##Kind = ::fpg::bind_statistics(#Kind, Kind::kNames);
