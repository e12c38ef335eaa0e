#include "matrix.h"

#include <map>

#include "counters.h"
#include "floats.h"
#include "memory.h"

namespace ptxsim {

namespace {

constexpr u32 COLUMNS = 8, MOST = 16;
constexpr u32 ROW_BYTES = 16;

// lanes 8j to 8j + 7 hold the addresses of the rows of matrix j; offsets in shared memory
SharedAddresses matrix_rows(Warp& w, const Instruction& I, const char* what) {
    const u32* base = w.lanes<u32>(I.a);
    const u32 rows = 8 * I.count;
    SharedAddresses at;
    for (u32 i = 0; i < rows; i++) at[i] = base[i] + u32(I.immediate);
    if (w.block->launch->options.counters)
        count_passes(w, I, rows == LANES ? ALL_LANES : (1u << rows) - 1, at, ROW_BYTES);
    for (u32 i = 0; i < rows; i++) at[i] = locate_shared(w, I, at[i], ROW_BYTES, i, what);
    return at;
}

// f(matrix, lane, offset, first byte in the register, bytes): lane l has two columns of row l / 4, or two rows of
// column l / 4
template <class F>
void each_piece(const Instruction& I, const SharedAddresses& rows, F f) {
    for (u32 j = 0; j < I.count; j++)
        for (u32 lane = 0; lane < LANES; lane++) {
            const u32 major = lane / 4, minor = lane % 4;
            if (I.variant == 0) {
                f(j, lane, rows[8 * j + major] + 4 * minor, 0, 4);
            } else {
                f(j, lane, rows[8 * j + 2 * minor] + 2 * major, 0, 2);
                f(j, lane, rows[8 * j + 2 * minor + 1] + 2 * major, 2, 2);
            }
        }
}

struct Tile {
    double a[MOST][MOST], b[MOST][COLUMNS], c[MOST][COLUMNS];
};

// the place of a lane's element j of the accumulator
u32 c_row(u32 lane, u32 j) { return lane / 4 + 8 * (j / 2); }
u32 c_column(u32 lane, u32 j) { return 2 * (lane % 4) + j % 2; }

void mma_f64(Warp& w, const Instruction& I, u32) {
    const Mma& shape = *I.mma;
    Tile t;
    const auto in = [&](u32 index, u32 lane) { return w.lanes<double>(I.ins[index])[lane]; };
    for (u32 i = 0; i < LANES; i++) {
        const u32 group = i / 4, rest = i % 4;
        for (u32 j = 0; j < shape.a; j++) {
            const bool tall = shape.rows == 16;
            const u32 row = tall ? group + 8 * (j % 2) : group, column = tall ? rest + 4 * (j / 2) : rest + 4 * j;
            t.a[row][column] = in(j, i);
        }
        for (u32 j = 0; j < shape.b; j++) t.b[rest + 4 * j][group] = in(shape.a + j, i);
        for (u32 j = 0; j < shape.c; j++) t.c[c_row(i, j)][c_column(i, j)] = in(shape.a + shape.b + j, i);
    }
    for (u32 k = 0; k < shape.depth; k++)
        for (u32 r = 0; r < shape.rows; r++)
            for (u32 c = 0; c < COLUMNS; c++) t.c[r][c] = __builtin_fma(t.a[r][k], t.b[k][c], t.c[r][c]);
    for (u32 i = 0; i < LANES; i++)
        for (u32 j = 0; j < shape.c; j++) {
            w.lanes<double>(I.outs[j])[i] = canonical(t.c[c_row(i, j)][c_column(i, j)]);
        }
}

float from_tf32(u32 bits) { return bit_cast<float>(bits & 0xffffe000); }

// two elements of a register; the low half has the lower column of A, the lower row of B
float half_of(Element element, u32 bits, u32 half) {
    const u16 x = u16(bits >> (16 * half));
    return element == Element::F16 ? from_half(x) : from_bfloat(x);
}

// products summed in float64, rounded once
void mma_f32(Warp& w, const Instruction& I, u32) {
    const Mma& shape = *I.mma;
    Tile t;
    const auto in = [&](u32 index, u32 lane) { return w.lanes<u32>(I.ins[index])[lane]; };
    for (u32 i = 0; i < LANES; i++) {
        const u32 group = i / 4, rest = i % 4;
        if (shape.element == Element::TF32) {
            for (u32 j = 0; j < shape.a; j++) t.a[group + 8 * (j % 2)][rest + 4 * (j / 2)] = from_tf32(in(j, i));
            for (u32 j = 0; j < shape.b; j++) t.b[rest + 4 * j][group] = from_tf32(in(shape.a + j, i));
        } else {
            for (u32 h = 0; h < 2; h++) {
                const u32 place = 2 * rest + h;
                for (u32 j = 0; j < shape.a; j++)
                    t.a[group + 8 * (j % 2)][place + 8 * (j / 2)] = half_of(shape.element, in(j, i), h);
                for (u32 j = 0; j < shape.b; j++)
                    t.b[place + 8 * j][group] = half_of(shape.element, in(shape.a + j, i), h);
            }
        }
        for (u32 j = 0; j < shape.c; j++)
            t.c[c_row(i, j)][c_column(i, j)] = double(bit_cast<float>(in(shape.a + shape.b + j, i)));
    }
    for (u32 k = 0; k < shape.depth; k++)
        for (u32 r = 0; r < shape.rows; r++)
            for (u32 c = 0; c < COLUMNS; c++) t.c[r][c] += t.a[r][k] * t.b[k][c];
    for (u32 i = 0; i < LANES; i++)
        for (u32 j = 0; j < shape.c; j++)
            w.lanes<float>(I.outs[j])[i] = canonical(float(t.c[c_row(i, j)][c_column(i, j)]));
}

Mma wide(u32 rows, u32 depth) {
    const u32 a = rows * depth / LANES, b = COLUMNS * depth / LANES, c = rows * COLUMNS / LANES;
    return {Element::F64, rows, depth, a, b, c, 8, mma_f64};
}

Mma narrow(Element element, u32 depth) {
    const u32 packed = element == Element::TF32 ? 1 : 2;  // elements of a register
    return {element, 16, depth, depth / (2 * packed), depth / (4 * packed), 4, 4, mma_f32};
}

}  // namespace

void load_matrix(Warp& w, const Instruction& I, u32) {
    const SharedAddresses rows = matrix_rows(w, I, "ldmatrix");
    u32 values[4][LANES];
    each_piece(I, rows, [&](u32 j, u32 lane, u32 offset, u32 first, u32 bytes) {
        if (w.block->launch->options.race) shared_read(w, I, offset, bytes, lane);
        memcpy((u8*)&values[j][lane] + first, &w.block->shared[offset], bytes);
    });
    // all addresses are read before a register is written
    for (u32 j = 0; j < I.count; j++) memcpy(w.registers + I.outs[j], values[j], sizeof values[j]);
}

void store_matrix(Warp& w, const Instruction& I, u32) {
    const SharedAddresses rows = matrix_rows(w, I, "stmatrix");
    each_piece(I, rows, [&](u32 j, u32 lane, u32 offset, u32 first, u32 bytes) {
        const u8* value = w.registers + I.ins[j] + 4 * lane + first;
        if (w.block->launch->options.race) shared_write(w, I, offset, bytes, lane, value);
        memcpy(&w.block->shared[offset], value, bytes);
    });
}

const Mma* find_mma(const std::string& opcode) {
    static const std::map<std::string, Mma> shapes = {
        {"mma.sync.aligned.m16n8k16.row.col.f64.f64.f64.f64", wide(16, 16)},
        {"mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64", wide(16, 8)},
        {"mma.sync.aligned.m16n8k4.row.col.f64.f64.f64.f64", wide(16, 4)},
        {"mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64", wide(8, 4)},
        {"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", narrow(Element::F16, 16)},
        {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", narrow(Element::BF16, 16)},
        {"mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32", narrow(Element::F16, 8)},
        {"mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32", narrow(Element::BF16, 8)},
        {"mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", narrow(Element::TF32, 8)},
    };
    const auto found = shapes.find(opcode);
    return found == shapes.end() ? nullptr : &found->second;
}

}  // namespace ptxsim
