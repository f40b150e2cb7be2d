# compute.s: a kernel that only computes (compute.c), with paging on. It is what the interpreter's speed is measured by.
#
# The result is written to COM1, and stands in EAX when the CPU halts.

.intel_syntax noprefix

.equ ROUNDS, 3                          # about 1.16 million instructions each

.include "serial.inc"
.include "boot.inc"
.include "paging.inc"

.section .text
main:
        push    ROUNDS                  # C passes arguments on the stack, the last one pushed first, ...
        call    compute
        add     esp, 4                  # ... the caller takes them off again, and the result is in EAX
        mov     edi, eax                # the write routines keep EDI
        write   "compute: "
        mov     eax, edi
        call    write_hex
        write   "\r\n"
        mov     eax, edi
stop:   cli
        hlt
        jmp     stop
