# calls.s: a kernel that follows pointers and calls functions (calls.c), with paging on. The speed of calls is measured
# by it.

.intel_syntax noprefix

.equ ROUNDS, 20                         # about 0.35 million instructions each

.include "result.inc"

.section .text
main:
        show_result calls, ROUNDS
