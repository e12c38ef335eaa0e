"""Columns of the tables that a step reads and writes, for every backend.

reflora/kernels/table.py is made from these at import. CMakeLists.txt runs this file for the C++ core's columns.h, where
there may be no torch: it imports nothing.
"""

# columns of one side; strides in elements. M, V, X (exp_avg, exp_avg_sq, max_exp_avg_sq, of storage type STATE) and W
# (float32 master weights, 0 where there are none) share the strides of P.
P, P_SR, P_SN, G, G_SR, G_SN, M, V, X, W, STEP, HYPER, N = range(13)
SIDE = 13
A_SIDE, B_SIDE = 0, SIDE
# columns of the row; PHASE, COUNT and SAVED are pointers, 0 where unused. KEPT: 1 where nothing has written the factors
# since the last step. TAG: the row's number in the whole optimizer, across devices
R, DTYPE, STATE, ACTIVE, PHASE, COUNT, SAVED, KEPT, TAG = range(2 * SIDE, 2 * SIDE + 9)
COLUMNS = 40

# what PHASE points at, besides 0: the moments are in units of S; RefLoRA-S balances the layer
REFACTORED_UNITS, BALANCED = 1, 2

# columns of the float64 result table, one row per table row
STATUS, KAPPA_A, KAPPA_B, BALANCE, SCALE, NORM_A, NORM_B = range(7)
RESULTS, REPORTED = 8, 7
# what STATUS says
REFACTORED, DEGENERATE, SKIPPED, PLAIN = range(4)

# columns of the float64 hyperparameter table, one row per parameter group
# LR_AT: address of a tensor on the device to read the learning rate from instead of LR, 0: none; LR_DTYPE: its dtype
LR, BETA1, BETA2, EPS, WEIGHT_DECAY, AMSGRAD, MAXIMIZE, LR_AT, LR_DTYPE = range(9)
HYPERS = 10

NUMBERS = {name: number for name, number in list(globals().items()) if name.isupper()}

if __name__ == "__main__":
    print("// Made from reflora/columns.py.\n#pragma once\n\nnamespace reflora {\n\nenum Column {")
    print(*(f"    {name} = {number}," for name, number in NUMBERS.items()), sep="\n")
    print("};\n\nstruct Number {\n    const char* name;\n    int number;\n};\n\nconstexpr Number NUMBERS[] = {")
    print(*(f'    {{"{name}", {name}}},' for name in NUMBERS), sep="\n")
    print("};\n\n}  // namespace reflora")
