# page_rights64.s: no execute, reserved bits, and pages of 2 MB and 1 GB.
#
# Mirrors: Intel SDM volume 3A, sections 4.5 "4-level paging", 4.6.1 "Determination of access rights", 4.7 "Page-fault
# exceptions".
#
# The page at `here` is the first of a table of its own; it leads to the frame `frame`.

.include "base64.inc"

.equ here, 0x200000
.equ gigabyte, 0x40000000
.equ EFER_NXE, 1 << 11
.equ PAGE_KERNEL, 3
.equ PAGE_PRESENT, 1
.equ PAGE_XD, 1 << 31                   # in the upper half of an entry: execute disable
.equ PAGE_BIT_51, 1 << 19               # no processor has that many bits of address: reserved
.equ PAGE_LARGE, 1 << 7
.equ PF_PRESENT, 1 << 0
.equ PF_WRITE, 1 << 1
.equ PF_USER, 1 << 2
.equ PF_RESERVED, 1 << 3
.equ PF_FETCH, 1 << 4
.equ RETURN, 0xC3

.section .pages
.balign 4096
table:          .skip 4096
frame:          .skip 4096

# Changes RAX.
.macro set_here rights, upper=0
        mov     dword ptr [table], offset frame + \rights
        mov     dword ptr [table + 4], \upper
        invlpg  [here]
.endm

.macro flush
        mov     rax, cr3
        mov     cr3, rax
.endm

.macro faults ring, error, instruction:vararg
        attempt ring=\ring
1:      \instruction
        caught  PF, error=\error, rip=1b, ring=\ring
        mov     rcx, cr2
        check   "CR2", rcx, here
.endm

.macro works ring, instruction:vararg
        attempt ring=\ring
        \instruction
1:      caught  NOTHING, rip=1b, ring=\ring
.endm

.macro fetch_faults ring, error
        mov     ebx, here
        attempt ring=\ring
        jmp     rbx
        trapped PF
        check   "error code", [seen_frame], \error
        check   "RIP", [seen_frame+8], here
        mov     rcx, cr2
        check   "CR2", rcx, here
.endm

.macro fetch_works ring
        mov     ebx, here
        attempt ring=\ring
        call    rbx
1:      caught  NOTHING, rip=1b, ring=\ring
.endm

.macro no_execute on
        mov     ecx, EFER
        rdmsr
        .if \on
        or      eax, EFER_NXE
        .else
        and     eax, ~EFER_NXE
        .endif
        wrmsr
.endm

.section .text
main:
        mov     dword ptr [directory + 8], offset table + PAGE_ALL
        mov     byte ptr [frame], RETURN
        flush

# ---- no execute -----------------------------------------------------------------------------------------------------

        experiment "Without EFER.NXE the bit is reserved, and an error code does not tell fetches"
        set_here PAGE_ALL, PAGE_XD
        faults  0, PF_PRESENT+PF_RESERVED, mov al, [here]
        faults  3, PF_PRESENT+PF_RESERVED+PF_USER+PF_WRITE, mov [here], al
        fetch_faults 0, PF_PRESENT+PF_RESERVED
        set_here 0
        fetch_faults 0, 0

        experiment "With it such a page is not executed, at any level"
        no_execute 1
        set_here PAGE_ALL, PAGE_XD
        fetch_faults 0, PF_PRESENT+PF_FETCH
        fetch_faults 3, PF_PRESENT+PF_FETCH+PF_USER

        experiment "But read and written"
        works   0, mov al, [here]
        works   3, lock and byte ptr [here], 0xFF

        experiment "The bit in a table above counts as well"
        set_here PAGE_ALL
        fetch_works 3
        mov     dword ptr [directory + 12], PAGE_XD
        flush
        fetch_faults 3, PF_PRESENT+PF_FETCH+PF_USER
        mov     dword ptr [directory + 12], 0
        flush
        fetch_works 0

        experiment "A fetch from a page that is absent, or the supervisor's, is told as one"
        set_here 0
        fetch_faults 0, PF_FETCH
        fetch_faults 3, PF_FETCH+PF_USER
        set_here PAGE_KERNEL
        fetch_faults 3, PF_PRESENT+PF_FETCH+PF_USER

# ---- reserved bits --------------------------------------------------------------------------------------------------

        experiment "A bit above the physical address is reserved"
        set_here PAGE_ALL, PAGE_BIT_51
        faults  0, PF_PRESENT+PF_RESERVED, mov al, [here]
        faults  3, PF_PRESENT+PF_RESERVED+PF_USER, mov al, [here]

        experiment "In an entry that is not present nothing is"
        set_here 0, PAGE_BIT_51
        faults  0, 0, mov al, [here]

        experiment "The size bit is, in the topmost table"
        set_here PAGE_ALL
        mov     rcx, 0x8000000000
        mov     dword ptr [pml4 + 8], offset pdpt + PAGE_ALL + PAGE_LARGE
        flush
        attempt
1:      mov     al, [rcx]
        caught  PF, error=PF_PRESENT+PF_RESERVED, rip=1b
        mov     dword ptr [pml4 + 8], 0

# ---- large pages ----------------------------------------------------------------------------------------------------

        experiment "A page of 1 GB"
        mov     dword ptr [frame + 0x123], 0x600DF00D
        mov     dword ptr [pdpt + 8], PAGE_ALL + PAGE_LARGE
        attempt
        mov     ecx, [gigabyte + frame + 0x123]
1:      caught  NOTHING, rip=1b
        check   "read", [seen_rcx], 0x600DF00D

        experiment "Its low address bits are reserved"
        or      dword ptr [pdpt + 8], 1 << 29
        flush
        attempt
1:      mov     ecx, [gigabyte]
        caught  PF, error=PF_PRESENT+PF_RESERVED, rip=1b
        mov     dword ptr [pdpt + 8], 0

        experiment "A page of 2 MB, and its low address bits"
        mov     dword ptr [directory + 16], PAGE_ALL + PAGE_LARGE
        flush
        attempt
        mov     ecx, [0x400000 + frame + 0x123]
1:      caught  NOTHING, rip=1b
        check   "read", [seen_rcx], 0x600DF00D
        or      dword ptr [directory + 16], 1 << 20
        flush
        attempt
1:      mov     ecx, [0x400000]
        caught  PF, error=PF_PRESENT+PF_RESERVED, rip=1b

        jmp     finish
