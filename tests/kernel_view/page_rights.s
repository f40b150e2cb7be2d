# page_rights.s: what a page fault says, and whom the bits of page tables keep out; SMEP and SMAP.
#
# Mirrors: Intel SDM volume 3A, sections 4.6 "Access rights", 4.7 "Page-fault exceptions", 4.8 "Accessed and dirty
# flags", 4.10.4 "Invalidation of TLBs and paging-structure caches".
#
# The page at `here` (2 MB) is the one that experiments change; it leads to the frame `frame`, all others to themselves.

.include "base.inc"
.include "pages.inc"

.equ here, 0x200000
.equ here_entry, 0x200 * 4              # in page_table
.equ PAGE_ACCESSED, 1 << 5
.equ PAGE_DIRTY, 1 << 6
.equ PAGE_4MB, 1 << 7
.equ PAGE_GLOBAL, 1 << 8
.equ PF_RESERVED, 1 << 3
.equ CR4_PSE, 1 << 4
.equ CR4_PGE, 1 << 7
.equ CR4_SMEP, 1 << 20
.equ CR4_SMAP, 1 << 21
.equ PAGE_KERNEL, PAGE_PRESENT + PAGE_WRITABLE
.equ RETURN, 0xC3                       # RET

segment FAR_LDT, PRESENT+TABLE_LDT, 0, 0, 0xFFF         # its base is set below

.section .pages
.balign 4096
frame:          .skip 4096
other_frame:    .skip 4096

# Changes EAX.
.macro set_here rights, where=frame
        mov     dword ptr [page_table + here_entry], offset \where + \rights
        invlpg  ds:[here]
.endm

.macro check_here rights, where=frame
        check   "entry", [page_table+here_entry], "offset \where + \rights"
.endm

.macro faults ring, error, instruction:vararg
        attempt ring=\ring
1:      \instruction
        caught  PF, error=\error, eip=1b, ring=\ring
        check   "CR2", [seen_cr2], here
.endm

.macro works ring, instruction:vararg
        attempt ring=\ring
        \instruction
1:      caught  NOTHING, eip=1b, ring=\ring
.endm

# Execution there: at level 0 by CALL, so that RET comes back.
.macro fetch_faults error, flags=0
        mov     ebx, here
        attempt flags=\flags
        jmp     ebx
        trapped PF
        check   "error code", [seen_frame], \error
        check   "EIP", [seen_frame+4], here
        check   "CR2", [seen_cr2], here
.endm

.macro fetch_works
        mov     ebx, here
        attempt
        call    ebx
1:      caught  NOTHING, eip=1b
.endm

.section .text
main:
        call    paging_on
        mov     byte ptr [frame], RETURN

# ---- absent, read-only, supervisor (4.6.1, 4.7) ---------------------------------------------------------------------

        experiment "A page that is absent: the error code tells reads from writes, and level 3 from the rest"
        set_here 0
        faults  0, 0, mov al, ds:[here]
        faults  0, PF_WRITE, mov ds:[here], al
        faults  3, PF_USER, mov al, ds:[here]
        faults  3, PF_USER+PF_WRITE, mov ds:[here], al

        experiment "Without NX and SMEP a fetch looks like a read"
        fetch_faults 0

        experiment "A page of the supervisor's is kept from level 3"
        set_here PAGE_KERNEL
        faults  3, PF_PRESENT+PF_USER, mov al, ds:[here]
        faults  3, PF_PRESENT+PF_USER+PF_WRITE, mov ds:[here], al
        works   0, mov al, ds:[here]

        experiment "A read-only page may not be written at level 3"
        set_here PAGE_PRESENT+PAGE_USER
        works   3, mov al, ds:[here]
        faults  3, PF_PRESENT+PF_USER+PF_WRITE, mov ds:[here], al

        experiment "At level 0 it may, unless CR0.WP is set"
        works   0, lock and byte ptr ds:[here], 0xFF
        mov     eax, cr0
        or      eax, CR0_WP
        mov     cr0, eax
        faults  0, PF_PRESENT+PF_WRITE, mov ds:[here], al
        set_here PAGE_PRESENT
        faults  0, PF_PRESENT+PF_WRITE, mov ds:[here], al
        mov     eax, cr0
        and     eax, ~CR0_WP
        mov     cr0, eax

        experiment "The directory must grant a right, too"
        set_here PAGE_ALL
        and     dword ptr [page_directory], ~PAGE_WRITABLE
        mov     eax, cr3
        mov     cr3, eax
        faults  3, PF_PRESENT+PF_USER+PF_WRITE, mov ds:[here], al
        or      dword ptr [page_directory], PAGE_WRITABLE
        mov     eax, cr3
        mov     cr3, eax
        works   3, mov ds:[here], al

        experiment "An access across two pages, the second absent: CR2 is its first byte, and nothing is written"
        mov     dword ptr [other_frame + 4092], 0x11111111
        mov     eax, [page_table + here_entry - 4]
        push    eax
        mov     dword ptr [page_table + here_entry - 4], offset other_frame + PAGE_ALL
        invlpg  ds:[here - 4096]
        set_here 0
        faults  0, PF_WRITE, mov dword ptr ds:[here - 2], 0
        pop     dword ptr [page_table + here_entry - 4]
        invlpg  ds:[here - 4096]
        check   "before the boundary", [other_frame+4092], 0x11111111

        experiment "The processor's own accesses are the supervisor's, at any level"
        mov     byte ptr [gdt + FAR_LDT + 4], here >> 16
        mov     eax, FAR_LDT
        lldt    ax
        mov     ecx, 4 + 3
        faults  3, 0, mov es, ecx
        xor     eax, eax
        lldt    ax

# ---- accessed and dirty (4.8) ---------------------------------------------------------------------------------------

        experiment "A read sets the accessed flag, a write the dirty flag as well"
        set_here PAGE_ALL
        mov     al, ds:[here]
        check_here PAGE_ALL+PAGE_ACCESSED
        mov     ds:[here], al
        check_here PAGE_ALL+PAGE_ACCESSED+PAGE_DIRTY

        experiment "A write that faults sets no dirty flag"
        set_here PAGE_PRESENT+PAGE_USER
        faults  3, PF_PRESENT+PF_USER+PF_WRITE, mov ds:[here], al
        check_bits "dirty", [page_table+here_entry], PAGE_DIRTY, 0

# ---- 4-MByte pages (4.3) --------------------------------------------------------------------------------------------

        experiment "With CR4.PSE an entry of the directory may be a page of 4 MB"
        mov     eax, CR4_PSE
        mov     cr4, eax
        mov     dword ptr [frame + 0x123], 0x600DF00D
        mov     dword ptr [page_directory + 8], PAGE_ALL + PAGE_4MB
        attempt
        mov     ecx, ds:[0x800000 + frame + 0x123]
        caught  NOTHING
        check   "read", [seen_ecx], 0x600DF00D
        check_bits "accessed and dirty", [page_directory+8], 0xFF, PAGE_ALL+PAGE_4MB+PAGE_ACCESSED

        experiment "A reserved bit in it is told of"
        or      dword ptr [page_directory + 8], 1 << 21
        mov     eax, cr3
        mov     cr3, eax
        attempt
1:      mov     ecx, ds:[0x800000]
        caught  PF, error=PF_PRESENT+PF_RESERVED, eip=1b
        mov     dword ptr [page_directory + 8], 0
        xor     eax, eax
        mov     cr4, eax

# ---- what the TLB may remember (4.10) -------------------------------------------------------------------------------

        .macro change_and reading, flush:vararg
        set_here PAGE_ALL
        mov     byte ptr [frame + 8], 1
        mov     byte ptr [other_frame + 8], 2
        mov     al, ds:[here + 8]               # now the TLB may know it
        mov     dword ptr [page_table + here_entry], offset other_frame + PAGE_ALL
        \flush
        movzx   ecx, byte ptr ds:[here + 8]
        check   "read", ecx, \reading
        .endm

        experiment "INVLPG makes a changed entry hold"
        change_and 2, invlpg ds:[here]
        experiment "It is any address in the page that it takes"
        change_and 2, invlpg ds:[here + 0xABC]
        .macro reload_cr3
        mov     eax, cr3
        mov     cr3, eax
        .endm
        experiment "So does MOV to CR3"
        change_and 2, reload_cr3

        experiment "A page fault forgets what there was: a page that came there needs no INVLPG"
        set_here 0
        faults  0, 0, mov al, ds:[here]
        mov     dword ptr [page_table + here_entry], offset frame + PAGE_ALL
        works   0, mov al, ds:[here]

        experiment "A global page is gone after INVLPG"
        mov     eax, CR4_PGE
        mov     cr4, eax
        set_here PAGE_ALL+PAGE_GLOBAL
        mov     al, ds:[here + 8]
        mov     dword ptr [page_table + here_entry], offset other_frame + PAGE_ALL + PAGE_GLOBAL
        invlpg  ds:[here]
        movzx   ecx, byte ptr ds:[here + 8]
        check   "read", ecx, 2

        experiment "And after CR4.PGE has been changed"
        set_here PAGE_ALL+PAGE_GLOBAL
        mov     al, ds:[here + 8]
        mov     dword ptr [page_table + here_entry], offset other_frame + PAGE_ALL + PAGE_GLOBAL
        xor     eax, eax
        mov     cr4, eax
        movzx   ecx, byte ptr ds:[here + 8]
        check   "read", ecx, 2

# ---- SMEP and SMAP (4.6.1) ------------------------------------------------------------------------------------------

        # From here on `here` is the only page of level 3.
        mov     edi, offset page_table
        mov     ecx, 1024
1:      and     dword ptr [edi], ~PAGE_USER
        add     edi, 4
        dec     ecx
        jnz     1b
        reload_cr3
        mov     byte ptr [frame], RETURN

        experiment "Without SMEP level 0 executes a page of level 3"
        set_here PAGE_ALL
        fetch_works

        experiment "With it that is a page fault, and the error code says that it was a fetch"
        mov     eax, CR4_SMEP
        mov     cr4, eax
        fetch_faults PF_PRESENT+PF_FETCH
        works   0, mov al, ds:[here]
        set_here 0
        fetch_faults PF_FETCH
        set_here PAGE_KERNEL
        fetch_works

        experiment "With SMAP level 0 neither reads nor writes a page of level 3"
        mov     eax, CR4_SMAP
        mov     cr4, eax
        set_here PAGE_ALL
        faults  0, PF_PRESENT, mov al, ds:[here]
        faults  0, PF_PRESENT+PF_WRITE, mov ds:[here], al

        experiment "Execution is not SMAP's business"
        fetch_works

        experiment "STAC lets it through, CLAC ends that"
        attempt
        stac
        mov     byte ptr ds:[here + 8], 5
        mov     cl, ds:[here + 8]
        clac
1:      mov     al, ds:[here]
        caught  PF, error=PF_PRESENT, eip=1b
        check_bits "read", [seen_ecx], 0xFF, 5

        experiment "It is the flag that counts: POPF does as well"
        attempt flags=FLAG_AC
        mov     cl, ds:[here + 8]
1:      caught  NOTHING, eip=1b, set=FLAG_AC

        experiment "STAC does not help the processor's own accesses"
        mov     eax, FAR_LDT
        lldt    ax
        mov     ecx, 4
        attempt flags=FLAG_AC
1:      mov     es, ecx
        caught  PF, error=PF_PRESENT, eip=1b
        check   "CR2", [seen_cr2], here
        xor     eax, eax
        lldt    ax

        experiment "Pages of the supervisor's are as ever"
        set_here PAGE_KERNEL
        works   0, mov al, ds:[here]
        xor     eax, eax
        mov     cr4, eax

        jmp     finish
