"""The columns of reflora/plan.py as compile-time constants; tests/test_kernels.py holds the two to each other."""

import triton.language as tl

# columns of one side; strides in elements
P, P_SR, P_SN, G, G_SR, G_SN, M, V, X, W, STEP, HYPER, N = (tl.constexpr(c) for c in range(13))
SIDE = tl.constexpr(13)
A_SIDE, B_SIDE = tl.constexpr(0), tl.constexpr(13)
# columns of the row
R, DTYPE, STATE, ACTIVE, PHASE, COUNT, SAVED, KEPT, TAG = (tl.constexpr(c) for c in range(26, 35))
COLUMNS = tl.constexpr(40)

# what PHASE points at, but for 0
REFACTORED_UNITS, BALANCED = tl.constexpr(1), tl.constexpr(2)

# columns of the float64 result table
STATUS, KAPPA_A, KAPPA_B, BALANCE, SCALE, NORM_A, NORM_B = (tl.constexpr(c) for c in range(7))
RESULTS = tl.constexpr(8)

# columns of the float64 hyperparameter table
LR, BETA1, BETA2, EPS, WEIGHT_DECAY, AMSGRAD, MAXIMIZE, LR_AT, LR_DTYPE = (tl.constexpr(c) for c in range(9))
HYPERS = tl.constexpr(10)

# values of the STATUS column (reflora/contract.py)
REFACTORED, DEGENERATE, SKIPPED, PLAIN = (tl.constexpr(c) for c in range(4))
