// Files mapped for reading, whose pages may vanish under the kernels: a read of a page that the file no longer has, or
// that its disk cannot deliver, raises SIGBUS, which ends the process unless it is handled.
//
// While a mapping is guarded, a fault inside it puts zero pages in the place of the page that failed and of all behind
// it, and is remembered. The thread that met it goes on with zeros, through no more than the rest of its kernel call:
// whoever called the kernel asks for the fault before the result is used. No stack is unwound, so it does not matter
// what the kernels hold. Faults elsewhere go to the handler that was there before.
#pragma once

#include <cstddef>
#include <cstdint>

namespace metagpt_fast {

// Guards `nbytes` > 0 bytes at `address`, the start of a read-only mapping, until `unguard_mapping`. Returns the
// guard's number. Throws std::system_error where the signal's handler cannot be set, std::bad_alloc.
int guard_mapping(std::uintptr_t address, std::size_t nbytes);

// Call it before the mapping is undone, while nothing reads it. The last one puts the previous handler back.
void unguard_mapping(int guard);

// Offset of the first fault's page in the mapping, or -1 if there was none.
std::int64_t fault_offset(int guard);

}  // namespace metagpt_fast
