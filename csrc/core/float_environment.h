#pragma once

#include <cfenv>

namespace metagpt_fast {

// Rounds to nearest and keeps subnormals while it lives, then restores the caller's floating-point environment. A host
// program may flush subnormals to zero (torch.set_flush_denormal, libraries built with -ffast-math), which would change
// results.
class DefaultFloatEnvironment {
 public:
  DefaultFloatEnvironment() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatEnvironment() { std::fesetenv(&saved_); }
  DefaultFloatEnvironment(const DefaultFloatEnvironment&) = delete;
  DefaultFloatEnvironment& operator=(const DefaultFloatEnvironment&) = delete;

 private:
  std::fenv_t saved_;
};

}  // namespace metagpt_fast
