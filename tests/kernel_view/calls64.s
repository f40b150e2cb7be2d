# calls64.s: the ways from level 3 to level 0 and back that 64-bit kernels use: SYSCALL, SYSENTER, call gates; SWAPGS.
#
# Mirrors: Intel SDM volume 3A, sections 5.8.3.1 "IA-32e mode call gates", 5.8.7 "Performing fast calls to system
# procedures with the SYSENTER and SYSEXIT instructions" and 5.8.8 "Fast system calls in 64-bit mode".
#
# None of the fast ways looks at the GDT: selectors are counted from those in a model-specific register, and CS and SS
# become flat. Nor do they change stacks by themselves, as a gate does.

.include "base64.inc"

.equ STAR, 0xC0000081
.equ LSTAR, 0xC0000082
.equ CSTAR, 0xC0000083
.equ FMASK, 0xC0000084
.equ GS_BASE, 0xC0000101
.equ KERNEL_GS_BASE, 0xC0000102
.equ FS_BASE, 0xC0000100
.equ SYSENTER_CS, 0x174
.equ SYSENTER_ESP, 0x175
.equ SYSENTER_EIP, 0x176

segment BOTH_SIZES, 0b10011010, 0b1110
segment CODE_16, 0b11111010, 0b0000, 0, 0xFFFF
call_gate GATE, KERNEL_CODE_64, behind_gate, dpl=3
call_gate GATE_KERNEL_ONLY, KERNEL_CODE_64, behind_gate
call_gate GATE_ABSENT, KERNEL_CODE_64, behind_gate, dpl=3, present=0
call_gate GATE_TO_32_BIT, KERNEL_CODE, behind_gate, dpl=3
call_gate GATE_TO_BOTH_SIZES, BOTH_SIZES, behind_gate, dpl=3
call_gate GATE_FAR_AWAY, KERNEL_CODE_64, behind_gate, dpl=3, upper=0x9000
call_gate GATE_BAD_TYPE, KERNEL_CODE_64, behind_gate, dpl=3, type_above=1
call_gate GATE_16, KERNEL_CODE_64, behind_gate, dpl=3, kind=4
call_gate GATE_TASK, KERNEL_TSS, behind_gate, dpl=3, kind=TASK_GATE

.macro write_msr number, low, high=0
        mov     ecx, \number
        mov     eax, offset \low
        mov     edx, \high
        wrmsr
.endm

# Reads an MSR into RBX. Changes RAX, RCX, RDX.
.macro read_msr number
        mov     ecx, \number
        rdmsr
        shl     rdx, 32
        lea     rbx, [rax + rdx]
.endm

.macro clear_efer_sce
        mov     ecx, EFER
        rdmsr
        and     eax, ~EFER_SCE
        wrmsr
.endm

.macro set_efer_sce
        mov     ecx, EFER
        rdmsr
        or      eax, EFER_SCE
        wrmsr
.endm

.macro sysexit_32
        .byte   0x0F, 0x35
.endm
.macro sysexit_64
        .byte   0x48, 0x0F, 0x35        # REX.W
.endm

# At level 0, at the system call's entry, on this stack.
.macro arrived stack, set=0, clear=0
        caught  UD, rip=system_call, from=\stack, rsp=\stack, ss=KERNEL_DATA_64, set=\set, clear=\clear
.endm

.section .text
behind_gate:
        ud2
system_call:
        ud2

main:
        write_msr STAR, 0, KERNEL_CODE_64+((USER_CODE_32-3)<<16)
        write_msr LSTAR, system_call
        write_msr CSTAR, system_call    # of another maker's processors, for compatibility mode
        write_msr FMASK, FLAG_IF+FLAG_DF

# ---- SYSCALL and SYSRET ---------------------------------------------------------------------------------------------

        experiment "SYSCALL goes to LSTAR at level 0, on the caller's stack, with RIP in RCX and RFLAGS in R11"
        attempt ring=3, flags=FLAG_IF+FLAG_DF+FLAG_CF
        syscall
1:      arrived user_stack_top, set=FLAG_CF, clear=FLAG_IF+FLAG_DF
        check   "RCX", [seen_rcx], "offset 1b"
        check   "R11", [seen_r11], 2+FLAG_IF+FLAG_DF+FLAG_CF

        experiment "SYSRET goes back to RCX at level 3, with RFLAGS from R11, RSP as it is"
        attempt
        mov     rcx, offset 1f
        mov     r11, 2 + FLAG_IF + FLAG_CF
        mov     rsp, offset user_stack_top
        sysretq
1:      caught  NOTHING, rip=1b, ring=3, set=FLAG_IF+FLAG_CF

        experiment "SYSRET with a 32-bit operand goes back to compatibility mode"
        attempt
        mov     ecx, offset 1f
        mov     r11, 2
        mov     rsp, offset user_stack_top
        sysretd
.code32
1:      mov     eax, -1
        inc     eax
2:      caught  NOTHING, rip=2b, ring=3, cs=USER_CODE_32

        experiment "SYSCALL is not for compatibility mode"
        attempt ring=3, bits=32
1:      .byte   0x0F, 0x05
        caught  UD, rip=1b, ring=3, cs=USER_CODE_32

        experiment "SYSRET is for level 0: #GP(0)"
        attempt ring=3
1:      sysretq
        caught  GP, error=0, rip=1b, ring=3

        experiment "SYSRET to what is not canonical is #GP(0), still at level 0"
        attempt
        mov     rcx, NOT_CANONICAL
1:      sysretq
        caught  GP, error=0, rip=1b

        experiment "Without EFER.SCE both are #UD"
        clear_efer_sce
        attempt ring=3
1:      syscall
        caught  UD, rip=1b, ring=3
        attempt
1:      sysretq
        caught  UD, rip=1b
        set_efer_sce

# ---- SYSENTER and SYSEXIT -------------------------------------------------------------------------------------------

        experiment "Without a code segment in its MSR SYSENTER is #GP(0)"
        write_msr SYSENTER_CS, 0
        attempt ring=3
1:      sysenter
        caught  GP, error=0, rip=1b, ring=3

        experiment "SYSENTER takes RIP and RSP from its MSRs, and turns interrupts off"
        write_msr SYSENTER_CS, KERNEL_CODE_64
        write_msr SYSENTER_ESP, ist2_stack_top
        write_msr SYSENTER_EIP, system_call
        attempt ring=3, flags=FLAG_IF+FLAG_DF
        sysenter
1:      arrived ist2_stack_top, set=FLAG_DF, clear=FLAG_IF

        experiment "From compatibility mode it does the same"
        attempt ring=3, flags=FLAG_IF, bits=32
        sysenter
1:      arrived ist2_stack_top, clear=FLAG_IF

        experiment "SYSEXIT goes to RDX at level 3, with RSP from RCX, to 64-bit code at CS + 32"
        attempt
        mov     edx, offset 1f
        mov     ecx, offset user_stack_top
        sysexit_64
1:      caught  NOTHING, rip=1b, ring=3, cs=KERNEL_CODE_64+32+3, ss=KERNEL_CODE_64+40+3

        experiment "With a 32-bit operand it goes to 32-bit code at CS + 16"
        attempt
        mov     edx, offset 1f
        mov     ecx, offset user_stack_top
        sysexit_32
.code32
1:      mov     eax, -1
        inc     eax
2:      caught  NOTHING, rip=2b, ring=3, cs=USER_CODE_32, ss=USER_DATA

        experiment "SYSEXIT is for level 0: #GP(0)"
        attempt ring=3
1:      sysexit_32
        caught  GP, error=0, rip=1b, ring=3

        experiment "SYSEXIT to what is not canonical is #GP(0), still at level 0"
        attempt
        mov     rdx, NOT_CANONICAL
        mov     ecx, offset user_stack_top
1:      sysexit_64
        caught  GP, error=0, rip=1b
        attempt
        mov     edx, offset 1f
        mov     rcx, NOT_CANONICAL
1:      sysexit_64
        caught  GP, error=0, rip=1b

# ---- SWAPGS ---------------------------------------------------------------------------------------------------------

        experiment "SWAPGS exchanges the base of GS with KERNEL_GS_BASE"
        write_msr GS_BASE, 0x1000, 1
        write_msr KERNEL_GS_BASE, scratch, 0
        attempt
        swapgs
        mov     rdi, gs:[0]
1:      caught  NOTHING, rip=1b
        mov     rax, 0x5EC2E7
        check   "read through GS", [seen_rdi], rax
        read_msr GS_BASE
        check   "GS base", rbx, "offset scratch"
        read_msr KERNEL_GS_BASE
        mov     rdi, 0x100001000
        check   "KERNEL_GS_BASE", rbx, rdi

        experiment "SWAPGS is for level 0: #GP(0)"
        attempt ring=3
1:      swapgs
        caught  GP, error=0, rip=1b, ring=3

        experiment "SWAPGS is for 64-bit mode: #UD"
        attempt ring=3, bits=32
1:      .byte   0x0F, 0x01, 0xF8
        caught  UD, rip=1b, ring=3, cs=USER_CODE_32

        experiment "Loading FS with a selector loads its base from the GDT"
        write_msr FS_BASE, 0x1000, 1
        mov     eax, USER_DATA
        mov     fs, eax
        read_msr FS_BASE
        check   "FS base", rbx, 0

        experiment "The bases of FS and GS must be canonical: #GP(0)"
        attempt
        mov     ecx, GS_BASE
        mov     edx, 0x9000
1:      wrmsr
        caught  GP, error=0, rip=1b
        attempt
        mov     ecx, LSTAR
        mov     edx, 0x9000
1:      wrmsr
        caught  GP, error=0, rip=1b

# ---- call gates (5.8.3.1) -------------------------------------------------------------------------------------------

        # A far CALL goes through memory here: the one with the address in it is gone.
        .macro call_far selector
        mov     dword ptr [far_pointer + 4], \selector
        .endm

        experiment "A call gate pushes SS, RSP, CS and RIP, 64 bits each, on the stack from the TSS"
        call_far GATE+3
        attempt ring=3, flags=FLAG_IF
        push    0x1111
        call    fword ptr [far_pointer]
1:      caught  UD, rip=behind_gate, from=ring0_stack_top-32, rsp=ring0_stack_top-32, ss=0, set=FLAG_IF
        check   "return RIP", [ring0_stack_top-32], "offset 1b"
        check   "return CS", [ring0_stack_top-24], USER_CODE_64
        check   "return RSP", [ring0_stack_top-16], "offset user_stack_top - 8"
        check   "return SS", [ring0_stack_top-8], USER_DATA

        experiment "From compatibility mode it leads to 64-bit code as well"
        attempt ring=3, bits=32
        .byte   0x9A                    # CALL ptr16:32
        .long   0xDEADBEEF
        .word   GATE + 3
1:      caught  UD, rip=behind_gate, from=ring0_stack_top-32, rsp=ring0_stack_top-32, ss=0
        check   "return RIP", [ring0_stack_top-32], "offset 1b"
        check   "return CS", [ring0_stack_top-24], USER_CODE_32

        experiment "At the same level it pushes CS and RIP only"
        call_far GATE
        attempt
        call    fword ptr [far_pointer]
1:      trapped UD
        check   "RIP", [seen_frame], "offset behind_gate"
        mov     rcx, [resume_rsp]
        sub     rcx, 16
        check   "RSP", [seen_frame+24], rcx
        check   "return RIP", [seen_frame+40], "offset 1b"      # right above the frame
        check   "return CS", [seen_frame+48], KERNEL_CODE_64

        experiment "RETF with a 64-bit operand goes back to level 3"
        attempt
        push    USER_DATA
        mov     rax, offset user_stack_top
        push    rax
        push    USER_CODE_64
        mov     rax, offset 1f
        push    rax
        retfq
1:      caught  NOTHING, rip=1b, ring=3

        .macro bad_gate text, vector, error, selector
        experiment "\text"
        call_far \selector
        attempt ring=3
1:      call    fword ptr [far_pointer]
        caught  \vector, error=\error, rip=1b, ring=3
        .endm

        bad_gate "Its DPL must not be below the level", GP, GATE_KERNEL_ONLY, GATE_KERNEL_ONLY
        bad_gate "It must be present", NP, GATE_ABSENT, GATE_ABSENT
        bad_gate "It must lead to 64-bit code", GP, KERNEL_CODE, GATE_TO_32_BIT
        bad_gate "Which must not be of both sizes", GP, BOTH_SIZES, GATE_TO_BOTH_SIZES
        bad_gate "At an address that is canonical: #GP(0)", GP, 0, GATE_FAR_AWAY
        bad_gate "The type in its upper half must be 0", GP, GATE_BAD_TYPE, GATE_BAD_TYPE
        bad_gate "There are no 16-bit call gates", GP, GATE_16, GATE_16
        bad_gate "There are no task gates", GP, GATE_TASK, GATE_TASK
        bad_gate "A TSS is no destination", GP, KERNEL_TSS, KERNEL_TSS+3
        bad_gate "A gate must be in the table", GP, 0xFF8, 0xFF8

        experiment "A far jump goes to compatibility mode, and to 64-bit mode again"
        mov     dword ptr [far_pointer], offset 1f
        call_far KERNEL_CODE
        attempt
        jmp     fword ptr [far_pointer]
.code32
1:      mov     ecx, -1
        inc     ecx                     # a REX prefix in 64-bit mode
        .byte   0xEA                    # JMP ptr16:32
        .long   1f
        .word   KERNEL_CODE_64
.code64
1:      caught  NOTHING, rip=1b
        check_bits "ECX", [seen_rcx], -1, 0

        jmp     finish

.section .data
.balign 8
scratch:        .quad 0x5EC2E7
far_pointer:    .long 0xDEADBEEF
                .word 0, 0
