# long64.s: enters long mode, the 64-bit mode, with four-level paging, and shows that it is there.
#
# Mirrors: Intel SDM volume 3A, sections 4.5 "4-level paging" and 10.8.5 "Initializing IA-32e mode".
#
# A 64-bit address is translated by four tables. Only 48 of its bits count: bits 63:48 must repeat bit 47.
#
#        63      48 47     39 38     30 29     21 20     12 11        0
#       +----------+---------+---------+---------+---------+-----------+
#       |  = bit 47|   PML4  |   PDPT  |directory|  table  |  offset   |
#       +----------+---------+---------+---------+---------+-----------+
#                       |         |         |         |
#            CR3 --> 512 entries each -+---------+-->  4 KB page
#                                      |
#                                      +- an entry with bit 7 (PS) set: 2 MB page, bits 20:0 are the offset
#
# An entry has 8 bytes: the flags of paging.inc in bits 11:0, the physical frame in 51:12, "no execute" in 63.
#
# What we build:
#
#       virtual                 through             physical
#       FFFFFFFF80000000   -->  [511][510][0]   -->  0 .. 2 MB, one 2 MB page: the kernel
#       0000000000000000   -->  [0][0][0]       -->  the same, until we have jumped high
#       FFFF800000000000   -->  [256][0][0][n]  -->  four 4 KB frames, the last one first

.intel_syntax noprefix

.include "serial.inc"
.include "boot.inc"

.equ KERNEL_CODE_64, 3 * 8
.equ REGION, 0xFFFF800000000000
.equ REGION_PAGES, 4

.equ PAGE_KERNEL, 1 << 0 | 1 << 1       # present, writable
.equ PAGE_2MB, 1 << 7
.equ CR0_PG, 1 << 31
.equ CR4_PAE, 1 << 5                    # entries of 8 bytes: long mode insists on it
.equ EFER, 0xC0000080                   # a model-specific register
.equ EFER_LME, 1 << 8                   # long mode: enable
.equ EFER_LMA_BIT, 10                   # long mode: active (set by the CPU when paging goes on with LME set)
.equ CPUID_LONG_MODE, 1 << 29

.section .data
.balign 8
gdt:
        .quad   0
        descriptor 0b10011010, 0b1100   # KERNEL_CODE: 32-bit, for the way here
        descriptor 0b10010010, 0b1100   # KERNEL_DATA
        descriptor 0b10011010, 0b1010   # KERNEL_CODE_64: L instead of D; base and limit are not looked at
gdt_end:

gdt_pointer_high:
        .word   gdt_end - gdt - 1
        .quad   gdt                     # in 64-bit mode LGDT reads eight bytes of address

.section .bss
.balign 4096
pml4:             .skip 4096
pdpt:             .skip 4096            # serves the low and the high map: entry 0 and entry 510
directory:        .skip 4096
region_pdpt:      .skip 4096
region_directory: .skip 4096
region_table:     .skip 4096
region_frames:    .skip 4096 * REGION_PAGES
kernel_stack:     .skip 4096
kernel_stack_top:

# ---- 32-bit code, at low addresses --------------------------------------------------------------------------------

.section .boot
.code32
protected_mode:
        mov     eax, KERNEL_DATA
        mov     ds, eax
        mov     es, eax
        mov     ss, eax
        mov     esp, 0x7C00

        mov     edi, offset bss_start - KERNEL_BASE     # page tables must start out empty
        mov     ecx, offset bss_dwords
        xor     eax, eax
        rep stosd

        mov     eax, 0x80000000         # CPUID: how far do the extended leaves go?
        cpuid
        cmp     eax, 0x80000001
        jb      no_long_mode
        mov     eax, 0x80000001
        cpuid
        test    edx, CPUID_LONG_MODE
        jz      no_long_mode

        # Each entry is 8 bytes, of which the upper four stay 0: all our tables are below 4 GB.
        mov     eax, offset directory - KERNEL_BASE + PAGE_KERNEL
        mov     dword ptr [pdpt - KERNEL_BASE + 8 * 0], eax
        mov     dword ptr [pdpt - KERNEL_BASE + 8 * 510], eax
        mov     eax, offset pdpt - KERNEL_BASE + PAGE_KERNEL
        mov     dword ptr [pml4 - KERNEL_BASE + 8 * 0], eax
        mov     dword ptr [pml4 - KERNEL_BASE + 8 * 511], eax
        mov     eax, PAGE_KERNEL | PAGE_2MB             # frame 0
        mov     dword ptr [directory - KERNEL_BASE + 8 * 0], eax

        mov     eax, offset region_pdpt - KERNEL_BASE + PAGE_KERNEL
        mov     dword ptr [pml4 - KERNEL_BASE + 8 * 256], eax
        mov     eax, offset region_directory - KERNEL_BASE + PAGE_KERNEL
        mov     dword ptr [region_pdpt - KERNEL_BASE], eax
        mov     eax, offset region_table - KERNEL_BASE + PAGE_KERNEL
        mov     dword ptr [region_directory - KERNEL_BASE], eax
        mov     edi, offset region_table - KERNEL_BASE
        mov     eax, offset region_frames - KERNEL_BASE + 4096 * (REGION_PAGES - 1) + PAGE_KERNEL
        mov     ecx, REGION_PAGES
1:      mov     [edi], eax
        sub     eax, 4096
        add     edi, 8
        dec     ecx
        jnz     1b

        # The order matters: PAE and LME first, with paging off; setting PG then turns long mode on.
        mov     eax, cr4
        or      eax, CR4_PAE
        mov     cr4, eax
        mov     eax, offset pml4 - KERNEL_BASE
        mov     cr3, eax
        mov     ecx, EFER
        rdmsr                           # EDX:EAX
        or      eax, EFER_LME
        wrmsr
        mov     eax, cr0
        or      eax, CR0_PG
        mov     cr0, eax
        jmp     KERNEL_CODE_64:long_mode        # until here "compatibility mode": CS still says 32-bit

no_long_mode:
        # write_string has been assembled as 64-bit code. Its bytes happen to mean the same in 32-bit mode (no REX
        # prefix, no one-byte INC or DEC), so it can be called from here, at its physical address.
        mov     esi, offset no_long_mode_text - KERNEL_BASE
        call    write_string - KERNEL_BASE
1:      cli
        hlt
        jmp     1b

.code64
long_mode:
        mov     rax, offset high
        jmp     rax

# ---- 64-bit code, high --------------------------------------------------------------------------------------------

# Writes a text given on the spot. Data is found relative to RIP, so the code would run at any address.
.macro say text
        .pushsection .rodata
9:      .asciz  "\text"
        .popsection
        lea     rsi, [rip + 9b]
        call    write_string
.endm

.section .rodata
no_long_mode_text:
        .asciz  "long64: this CPU has no long mode\r\n"
.balign 8
factor_1: .quad 0x0123456789ABCDEF
factor_2: .quad 0xFEDCBA9876543210

.section .text
high:
        lea     rsp, [rip + kernel_stack_top]
        lgdt    [rip + gdt_pointer_high]
        mov     qword ptr [rip + pml4], 0       # drop the identity map, and have the TLB forget it
        mov     rax, cr3
        mov     cr3, rax

        say     "long64: long mode, four-level paging, 64-bit code at "
        lea     rax, [rip + high]
        call    write_hex_64
        say     "\r\nlong64: CS.L = "
        mov     eax, cs
        lar     eax, eax                # the upper half of CS's descriptor: L is bit 53 - 32
        shr     eax, 53 - 32
        call    write_bit
        say     ", EFER.LMA = "
        mov     ecx, EFER
        rdmsr
        shr     eax, EFER_LMA_BIT
        call    write_bit

        # 64 bits times 64 bits is 128, in RDX:RAX. Both factors are loaded relative to RIP.
        say     "\r\nlong64: "
        mov     rax, [rip + factor_1]
        call    write_hex_64
        say     " * "
        mov     rax, [rip + factor_2]
        call    write_hex_64
        say     " = "
        mov     rax, [rip + factor_1]
        mul     qword ptr [rip + factor_2]
        mov     r12, rax                # R8-R15 exist in 64-bit mode only
        mov     rax, rdx
        call    write_hex_64
        mov     rax, r12
        call    write_hex_64
        say     "\r\n"

        # Write into each page of the region its own address, then look at the frames through the 2 MB page.
        mov     r12, REGION
        mov     ecx, REGION_PAGES
1:      mov     [r12], r12
        add     r12, 4096
        dec     ecx
        jnz     1b

        lea     r12, [rip + region_frames]
        mov     r13d, REGION_PAGES
2:      say     "long64: 4 KB frame "
        mov     rax, r12
        sub     rax, KERNEL_BASE        # its physical address
        call    write_hex_64
        say     " holds "
        mov     rax, [r12]
        call    write_hex_64
        say     "\r\n"
        add     r12, 4096
        dec     r13d
        jnz     2b

        say     "long64: halted\r\n"
3:      cli
        hlt
        jmp     3b

# Writes RAX as sixteen hexadecimal digits. May change RAX, RBX, RCX, RDX, R8.
write_hex_64:
        mov     r8, rax
        shr     rax, 32
        call    write_hex
        mov     eax, r8d                # writing EAX clears the upper half of RAX
        jmp     write_hex

# Writes bit 0 of EAX. May change EAX, EDX.
write_bit:
        and     eax, 1
        add     al, '0'
        jmp     write_byte
