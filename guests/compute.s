# compute.s: a kernel that only computes (compute.c), with paging on. The speed of loops is measured by it.

.intel_syntax noprefix

.equ ROUNDS, 3                          # about 1.16 million instructions each

.include "result.inc"

.section .text
main:
        show_result compute, ROUNDS
