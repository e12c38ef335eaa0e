// A torch CPU allocator that tells the emulator of every tensor, with red zones around it.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

extern "C" void ps_register(uint64_t begin, uint64_t size);
extern "C" void ps_unregister(uint64_t begin);

namespace {

constexpr size_t ZONE = 256, ALIGNMENT = 64;
constexpr uint8_t PRIORITY = 255;
bool poison = true;

void release(void* p) {
    if (!p) return;
    ps_unregister(reinterpret_cast<uint64_t>(p));
    free(static_cast<char*>(p) - ZONE);
}

struct Tracked : c10::Allocator {
    c10::DataPtr allocate(size_t size) override {
        const c10::Device cpu(c10::DeviceType::CPU);
        if (!size) return {nullptr, nullptr, &release, cpu};
        const size_t all = (size + 2 * ZONE + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
        char* begin = static_cast<char*>(aligned_alloc(ALIGNMENT, all));
        if (!begin) throw std::bad_alloc();
        if (poison) memset(begin, 0xff, all);  // NaN, or the whole number -1
        void* p = begin + ZONE;
        ps_register(reinterpret_cast<uint64_t>(p), size);
        return {p, p, &release, cpu};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &release; }
    void copy_data(void* to, const void* from, std::size_t size) const override { default_copy_data(to, from, size); }
};

}  // namespace

extern "C" __attribute__((visibility("default"))) void ps_track_torch(int with_poison) {
    static auto* const allocator = new Tracked;  // never destroyed: torch may ask to the very end
    poison = with_poison;
    c10::SetCPUAllocator(allocator, PRIORITY);
}
