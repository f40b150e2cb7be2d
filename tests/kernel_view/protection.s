# protection.s: what programs at level 3 are kept from, and what they are made to notice: alignment, ports, tables, FPU.
#
# Mirrors: Intel SDM volume 3A, 6.15 "Interrupt 17 - Alignment Check Exception (#AC)" and "Interrupt 7 - Device Not
# Available Exception (#NM)"; 2.5 "Control registers" (AM, EM, MP, TS; TSD, UMIP); volume 1, 19.5 "Protected-mode I/O".

.include "base.inc"

.equ CR0_MP, 1 << 1
.equ CR0_EM, 1 << 2
.equ CR0_TS, 1 << 3
.equ CR0_AM, 1 << 18
.equ CR4_TSD, 1 << 2
.equ CR4_OSFXSR, 1 << 9
.equ CR4_UMIP, 1 << 11

segment MAPPED_TSS, PRESENT+TSS_32, 0, mapped_tss, mapped_tss_size-1
segment BASE_1, 0b11110010, 0b1100, 1           # level 3, its base is no multiple of anything
vector OPEN, INTERRUPT_GATE_32, dpl=3

.section .data
.balign 16
data:   .skip   32

# A TSS with an I/O permission bit map (figure 19-2): a 1 forbids a port. It ends with the TSS, at port 97h.
.balign 4
mapped_tss:
        .long   0, ring0_stack_top, KERNEL_DATA
        .skip   102 - (. - mapped_tss)
        .word   io_map - mapped_tss
io_map: .skip   0x80 / 8, 0xFF
        .byte   0b11110000              # ports 80h to 83h are allowed, 84h to 87h are not
        .byte   0xFF
        .byte   0                       # ports 90h to 97h are allowed
.equ mapped_tss_size, . - mapped_tss

.section .bss
.balign 16
fpu_state:      .skip 512
other_state:    .skip 512

# Sets or clears bits of CR0 or CR4. Changes EAX.
.macro turn_on register, bits
        mov     eax, \register
        or      eax, \bits
        mov     \register, eax
.endm
.macro turn_off register, bits
        mov     eax, \register
        and     eax, ~(\bits)
        mov     \register, eax
.endm

.section .text
main:

# ---- alignment (6.15, interrupt 17) ---------------------------------------------------------------------------------

        .macro unaligned instruction:vararg
        mov     ebx, offset data
        attempt ring=3, flags=FLAG_AC
1:      \instruction
        caught  AC, error=0, eip=1b, ring=3, set=FLAG_AC
        .endm

        .macro aligned ring, flags, instruction:vararg
        mov     ebx, offset data
        attempt ring=\ring, flags=\flags
        \instruction
1:      caught  NOTHING, eip=1b, ring=\ring
        .endm

        turn_on cr0, CR0_AM

        experiment "With CR0.AM and EFLAGS.AC what is not aligned is #AC(0) at level 3"
        unaligned mov eax, [ebx+1]
        unaligned mov eax, [ebx+2]
        unaligned mov [ebx+3], eax
        unaligned mov ax, [ebx+1]
        unaligned inc word ptr [ebx+3]

        experiment "What is aligned to its size is not"
        aligned 3, FLAG_AC, mov eax, [ebx+4]
        aligned 3, FLAG_AC, mov ax, [ebx+2]
        aligned 3, FLAG_AC, mov al, [ebx+3]

        experiment "Nor is anything at level 0"
        aligned 0, FLAG_AC, mov eax, [ebx+1]

        experiment "Nor with AC clear"
        aligned 3, 0, mov eax, [ebx+1]

        experiment "The stack counts as well"
        attempt ring=3, flags=FLAG_AC
        dec     esp
1:      push    eax
        caught  AC, error=0, eip=1b, ring=3, user_esp=user_stack_top-1
        attempt ring=3, flags=FLAG_AC
        sub     esp, 6
1:      pop     eax
        caught  AC, error=0, eip=1b, ring=3, user_esp=user_stack_top-6

        experiment "It is the linear address that counts"
        mov     ebx, offset data
        mov     ecx, BASE_1 + 3
        attempt ring=3, flags=FLAG_AC
        mov     es, ecx
        mov     eax, es:[ebx+3]
1:      mov     eax, es:[ebx]
        caught  AC, error=0, eip=1b, ring=3

        experiment "What the processor does for itself is not checked: the frame of an interrupt"
        add     dword ptr [tss + 4], 2                  # ESP0
        attempt ring=3, flags=FLAG_AC
        int     OPEN
1:      caught  OPEN, eip=1b, ring=3, set=FLAG_AC, from=ring0_stack_top+2
        sub     dword ptr [tss + 4], 2

        experiment "Without CR0.AM EFLAGS.AC does nothing"
        turn_off cr0, CR0_AM
        aligned 3, FLAG_AC, mov eax, [ebx+1]

# ---- ports (volume 1, 19.5.2) ---------------------------------------------------------------------------------------

        .macro forbidden instruction:vararg
        mov     edx, 0x3F0
        attempt ring=3
1:      \instruction
        caught  GP, error=0, eip=1b, ring=3
        .endm

        .macro allowed flags, instruction:vararg
        mov     edx, 0x84
        attempt ring=3, flags=\flags
        \instruction
1:      caught  NOTHING, eip=1b, ring=3
        .endm

        experiment "A TSS without a map forbids all ports to level 3"
        forbidden in al, 0x80
        forbidden out dx, eax

        mov     eax, MAPPED_TSS
        ltr     ax

        experiment "A 0 in the map allows a port, a 1 forbids it"
        allowed 0, out 0x80, al
        allowed 0, in al, 0x83
        forbidden out 0x84, al
        forbidden in al, 0x7F

        experiment "A wide access needs all of its ports"
        allowed 0, out 0x80, eax
        allowed 0, out 0x82, ax
        forbidden out 0x81, eax
        forbidden out 0x83, ax
        forbidden in ax, 0x7F

        experiment "Beyond the end of the TSS every port is forbidden"
        forbidden in al, dx
        forbidden out 0x98, al

        experiment "The map is read two bytes at a time: the last byte before the end allows nothing"
        forbidden out 0x90, al

        experiment "The same goes for INS and OUTS"
        mov     esi, offset data
        mov     edx, 0x80
        attempt ring=3
        outsb
1:      caught  NOTHING, eip=1b, ring=3
        forbidden outsb
        forbidden insb

        experiment "With IOPL 3 the map is not looked at"
        allowed FLAG_IOPL, out dx, al
        allowed FLAG_IOPL, in al, 0x98

        experiment "Nor is it at level 0"
        attempt
        out     0x84, al
1:      caught  NOTHING, eip=1b

        experiment "CLI and STI ask for IOPL"
        attempt ring=3, flags=FLAG_IOPL+FLAG_IF
        cli
1:      caught  NOTHING, eip=1b, ring=3, clear=FLAG_IF
        forbidden cli
        forbidden sti

        mov     byte ptr [gdt + KERNEL_TSS + 5], PRESENT + TSS_32
        mov     eax, KERNEL_TSS
        ltr     ax

# ---- CR4.UMIP and CR4.TSD -------------------------------------------------------------------------------------------

        experiment "Without CR4.UMIP level 3 may look where the tables are"
        allowed 0, sgdt [data]
        allowed 0, sidt [data]
        allowed 0, sldt eax
        allowed 0, str eax
        allowed 0, smsw eax

        experiment "With it that is #GP(0)"
        turn_on cr4, CR4_UMIP
        forbidden sgdt [data]
        forbidden sidt [data]
        forbidden sldt eax
        forbidden str eax
        forbidden smsw eax

        experiment "But not at level 0"
        aligned 0, 0, sgdt [data]
        aligned 0, 0, smsw eax
        turn_off cr4, CR4_UMIP

        experiment "With CR4.TSD RDTSC is for level 0"
        allowed 0, rdtsc
        turn_on cr4, CR4_TSD
        forbidden rdtsc
        aligned 0, 0, rdtsc
        turn_off cr4, CR4_TSD

# ---- the state of the FPU and its next user (6.15, interrupt 7) -----------------------------------------------------

        .macro not_available instruction:vararg
        attempt
1:      \instruction
        caught  NM, eip=1b
        .endm

        .macro undefined instruction:vararg
        attempt
1:      \instruction
        caught  UD, eip=1b
        .endm

        experiment "With CR0.TS the first FPU instruction is #NM"
        turn_on cr0, CR0_TS
        turn_off cr0, CR0_MP+CR0_EM
        not_available fninit
        not_available fld1
        not_available fxsave [fpu_state]
        not_available fxrstor [fpu_state]

        experiment "WAIT is #NM only if CR0.MP is set as well"
        aligned 0, 0, fwait
        turn_on cr0, CR0_MP
        not_available fwait

        experiment "So are MMX and SSE"
        turn_on cr4, CR4_OSFXSR
        not_available movd mm0, eax
        not_available movaps xmm0, xmm1
        not_available ldmxcsr [data]

        experiment "SSE is #UD without CR4.OSFXSR"
        turn_off cr4, CR4_OSFXSR
        undefined movaps xmm0, xmm1
        undefined ldmxcsr [data]

        experiment "With CR0.EM the FPU is #NM, to be emulated; MMX and SSE are #UD"
        turn_on cr4, CR4_OSFXSR
        turn_off cr0, CR0_TS
        turn_on cr0, CR0_EM
        not_available fninit
        not_available fld1
        not_available fxsave [fpu_state]
        undefined movd mm0, eax
        undefined movaps xmm0, xmm1
        aligned 0, 0, fwait
        turn_off cr0, CR0_EM

        experiment "CLTS is for level 0"
        forbidden clts

        experiment "A kernel gives the FPU to the task that uses it: #NM, CLTS, FXSAVE, FXRSTOR, and on it goes"
        fninit
        fxsave  [other_state]
        mov     word ptr [other_state], 0x027F          # the other task's control word
        mov     word ptr [idt + 8 * NM], offset switch_fpu
        turn_on cr0, CR0_TS
        attempt ring=3
        fwait
        mov     ecx, 1
1:      caught  NOTHING, eip=1b, ring=3
        mov     word ptr [idt + 8 * NM], offset stubs + 8 * NM
        check   "ECX", [seen_ecx], 1
        mov     ecx, cr0
        check_bits "TS", ecx, CR0_TS, 0
        fxsave  [other_state]
        movzx   ecx, word ptr [fpu_state]
        check   "control word saved", ecx, 0x037F
        movzx   ecx, word ptr [other_state]
        check   "control word loaded", ecx, 0x027F
        jmp     1f
switch_fpu:
        clts
        fxsave  ss:[fpu_state]
        fxrstor ss:[other_state]
        iretd
1:

        experiment "FXSAVE and FXRSTOR want 16 bytes' alignment: #GP(0)"
        attempt
1:      fxsave  [fpu_state + 8]
        caught  GP, error=0, eip=1b
        attempt
1:      fxrstor [fpu_state + 8]
        caught  GP, error=0, eip=1b

        experiment "FXRSTOR refuses reserved bits of MXCSR: #GP(0)"
        fxsave  [fpu_state]
        mov     dword ptr [fpu_state + 24], 0xFFFF0000
        attempt
1:      fxrstor [fpu_state]
        caught  GP, error=0, eip=1b

# ---- privileged instructions ----------------------------------------------------------------------------------------

        experiment "Control registers and the like are for level 0"
        forbidden mov eax, cr0
        forbidden mov cr3, eax
        forbidden lgdt [data]
        forbidden lidt [data]
        forbidden lldt ax
        forbidden ltr ax
        forbidden lmsw ax
        forbidden invlpg [data]
        forbidden rdmsr
        forbidden wrmsr
        forbidden invd
        forbidden wbinvd
        forbidden hlt

        jmp     finish
