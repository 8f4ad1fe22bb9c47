#pragma once

#include <unistd.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace metagpt_fast::test {

// A file that is gone when this is.
class TemporaryFile {
 public:
  TemporaryFile() {
    const char* folder = std::getenv("TMPDIR");
    std::string path = std::string(folder != nullptr ? folder : "/tmp") + "/metagpt_fast_test_XXXXXX";
    descriptor_ = ::mkstemp(path.data());
    if (descriptor_ < 0) throw std::runtime_error("cannot make a temporary file at " + path);
    ::unlink(path.c_str());
  }
  ~TemporaryFile() { ::close(descriptor_); }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;
  int descriptor() const { return descriptor_; }

 private:
  int descriptor_;
};

}  // namespace metagpt_fast::test
