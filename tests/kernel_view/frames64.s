# frames64.s: interrupts in 64-bit mode: frames, stacks, IST, gates and returns; compatibility mode.
#
# Mirrors: Intel SDM volume 3A, section 6.14 "Exception and interrupt handling in 64-bit mode".

.include "base64.inc"

segment BOTH_SIZES, 0b10011010, 0b1110          # L and D: reserved
segment SHORT_DATA, 0b11110010, 0b0100, 0, 0xFF
vector OPEN, dpl=3
vector OPEN_TRAP, kind=TRAP_GATE, dpl=3
vector KERNEL_ONLY
vector ON_IST1, ist=1, dpl=3
vector ON_IST2, ist=2, dpl=3
vector ON_BAD_IST, ist=3
vector TO_32_BIT, selector=KERNEL_CODE
vector TO_BOTH_SIZES, selector=BOTH_SIZES
vector TO_NULL, selector=0
vector TO_FAR_AWAY, upper=0x9000
vector OF_16_BIT, kind=INTERRUPT_GATE_16
vector OF_TASK, kind=TASK_GATE

.section .text
main:

# ---- frames (6.14.2) ------------------------------------------------------------------------------------------------

        experiment "A frame has five words of 64 bits, SS and RSP in it at every level"
        attempt
        int     OPEN
1:      caught  OPEN, rip=1b
        attempt ring=3, flags=FLAG_IF
        int     OPEN
1:      caught  OPEN, rip=1b, ring=3, set=FLAG_IF
        check_bits "IF in the handler", [seen_rflags], FLAG_IF, 0

        experiment "It begins at a multiple of 16, wherever RSP was"
        attempt
        sub     rsp, 8
1:      int     OPEN
        trapped OPEN
        mov     rax, [resume_rsp]
        sub     rax, 8
        check   "saved RSP", [seen_frame+24], rax
        mov     rax, [resume_rsp]
        sub     rax, 8
        and     rax, ~15
        sub     rax, 40
        check   "stack", [seen_rsp], rax
        attempt
        sub     rsp, 3
1:      int     OPEN
        trapped OPEN
        mov     rax, [resume_rsp]
        sub     rax, 3
        check   "saved RSP", [seen_frame+24], rax
        mov     rax, [resume_rsp]
        sub     rax, 3
        and     rax, ~15
        sub     rax, 40
        check   "stack", [seen_rsp], rax

        experiment "An error code makes it six"
        attempt ring=3
1:      int     KERNEL_ONLY
        caught  GP, error=KERNEL_ONLY*8+IDT, rip=1b, ring=3

        experiment "Coming from level 3, the handler's SS is null"
        attempt ring=3
        int     OPEN
        trapped OPEN
        check   "SS", [seen_ss], 0

        experiment "At the same level SS stays what it was"
        attempt
        int     OPEN
        trapped OPEN
        check   "SS", [seen_ss], KERNEL_DATA

        experiment "A trap gate leaves interrupts on, and NT goes"
        attempt ring=3, flags=FLAG_IF+FLAG_NT
        int     OPEN_TRAP
1:      caught  OPEN_TRAP, rip=1b, ring=3, set=FLAG_IF+FLAG_NT
        check_bits "IF and NT in the handler", [seen_rflags], FLAG_IF+FLAG_NT, FLAG_IF

# ---- IST (6.14.5) ---------------------------------------------------------------------------------------------------

        experiment "A gate with an IST gets that stack from level 3 ..."
        attempt ring=3
        int     ON_IST1
1:      caught  ON_IST1, rip=1b, ring=3, from=ist1_stack_top
        experiment "... and at level 0 as well"
        attempt
        int     ON_IST2
1:      caught  ON_IST2, rip=1b, from=ist2_stack_top
        check   "SS", [seen_ss], KERNEL_DATA

        experiment "The pointer in the TSS is aligned to 16, too"
        sub     qword ptr [tss_ist], 8
        attempt
        int     ON_IST1
1:      caught  ON_IST1, rip=1b, from=ist1_stack_top-8
        add     qword ptr [tss_ist], 8

        experiment "#DF finds a stack by IST when there is no page where RSP points"
        mov     byte ptr [idt + 16 * DF + 4], 1
        attempt
        mov     rsp, 0x300000
        push    rax
        caught  DF, error=0, from=ist1_stack_top, rsp=0x300000
        mov     rax, cr2
        check   "CR2", rax, 0x2FFFF8

        experiment "#DF finds a stack by IST when RSP is not canonical"
        attempt
        mov     rsp, NOT_CANONICAL
        push    rax
        caught  DF, error=0, from=ist1_stack_top, rsp=NOT_CANONICAL
        mov     byte ptr [idt + 16 * DF + 4], 0

        experiment "A page fault on an IST stack of its own needs no double fault"
        mov     byte ptr [idt + 16 * PF + 4], 2
        attempt
        mov     rsp, 0x300000
1:      push    rax
        caught  PF, error=2, rip=1b, from=ist2_stack_top, rsp=0x300000
        mov     byte ptr [idt + 16 * PF + 4], 0

        experiment "An IST pointer that is not canonical is #SS(0)"
        attempt
1:      int     ON_BAD_IST
        caught  STACK_FAULT, error=0, rip=1b

# ---- gates (6.14.1) -------------------------------------------------------------------------------------------------

        experiment "A handler must be 64-bit code: #GP with the segment"
        attempt
1:      int     TO_32_BIT
        caught  GP, error=KERNEL_CODE, rip=1b

        experiment "A segment that is of 64 and of 32 bits is none"
        attempt
1:      int     TO_BOTH_SIZES
        caught  GP, error=BOTH_SIZES, rip=1b

        experiment "A handler's segment must not be null"
        attempt
1:      int     TO_NULL
        caught  GP, error=0, rip=1b

        experiment "A handler's address must be canonical: #GP(0)"
        attempt
1:      int     TO_FAR_AWAY
        caught  GP, error=0, rip=1b

        experiment "There are no 16-bit gates, and no tasks"
        attempt
1:      int     OF_16_BIT
        caught  GP, error=OF_16_BIT*8+IDT, rip=1b
        attempt
1:      int     OF_TASK
        caught  GP, error=OF_TASK*8+IDT, rip=1b

        experiment "A gate beyond the end of the IDT: 16 bytes each count"
        attempt
1:      int     0xF0
        caught  GP, error=0xF0*8+IDT, rip=1b

# ---- IRET (6.14.3) --------------------------------------------------------------------------------------------------

        .macro push_frame rip, cs, rsp, ss, flags=2
        push    \ss
        mov     rax, offset \rsp
        push    rax
        push    \flags
        push    \cs
        mov     rax, offset \rip
        push    rax
        .endm

        experiment "IRET pops SS and RSP at the same level, too"
        attempt
        push_frame 1f, KERNEL_CODE_64, user_stack_top, KERNEL_DATA
        iretq
1:      caught  NOTHING, rip=1b, rsp=user_stack_top

        experiment "SS may be null below level 3"
        attempt
        push_frame 1f, KERNEL_CODE_64, user_stack_top, 0
        iretq
1:      caught  NOTHING, rip=1b, rsp=user_stack_top, ss=0

        .macro bad_iret text, error, rip, cs, rsp=user_stack_top, ss=KERNEL_DATA, flags=2
        experiment "\text"
        attempt
        push_frame \rip, \cs, \rsp, \ss, \flags
1:      iretq
2:      trapped GP
        check   "error code", [seen_frame], \error
        check   "RIP", [seen_frame+8], "offset 1b"
        .endm

        bad_iret "SS must not be null at level 3", 0, 2f, USER_CODE_64, user_stack_top, 0
        bad_iret "RIP must be canonical", 0, NOT_CANONICAL, USER_CODE_64, user_stack_top, USER_DATA
        bad_iret "RIP must be canonical at level 0 as well", 0, NOT_CANONICAL, KERNEL_CODE_64
        bad_iret "CS must not be of both sizes", BOTH_SIZES, 2f, BOTH_SIZES

        experiment "There is no task to go back to: IRET with NT set is #GP(0)"
        attempt flags=FLAG_NT
1:      iretq
        caught  GP, error=0, rip=1b, set=FLAG_NT

        experiment "IRETD pops five words of 32 bits"
        attempt
        sub     rsp, 20
        mov     dword ptr [rsp], offset 1f
        mov     dword ptr [rsp + 4], KERNEL_CODE_64
        mov     dword ptr [rsp + 8], 2 + FLAG_DF
        mov     dword ptr [rsp + 12], offset user_stack_top
        mov     dword ptr [rsp + 16], KERNEL_DATA
        iretd
1:      caught  NOTHING, rip=1b, rsp=user_stack_top, set=FLAG_DF

        experiment "RSP that is not canonical is found out when it is used: #SS(0)"
        attempt ring=3
        mov     rsp, NOT_CANONICAL
1:      pop     rax
        caught  STACK_FAULT, error=0, rip=1b, ring=3, rsp=NOT_CANONICAL

# ---- what is not canonical ------------------------------------------------------------------------------------------

        experiment "Data there are #GP(0), by way of RBP or RSP #SS(0)"
        mov     rbx, NOT_CANONICAL
        mov     rbp, rbx
        attempt
1:      mov     al, [rbx]
        caught  GP, error=0, rip=1b
        mov     rbp, NOT_CANONICAL
        attempt
1:      mov     al, [rbp]
        caught  STACK_FAULT, error=0, rip=1b

        experiment "So is one byte of many"
        mov     rbx, FIRST_NOT_CANONICAL - 4
        attempt
1:      mov     rax, [rbx]
        caught  GP, error=0, rip=1b

        experiment "A jump there is #GP(0), at the jump"
        mov     rbx, NOT_CANONICAL
        attempt
1:      jmp     rbx
        caught  GP, error=0, rip=1b
        mov     rbx, NOT_CANONICAL
        attempt
1:      call    rbx
        caught  GP, error=0, rip=1b
        attempt
        mov     rax, NOT_CANONICAL
        push    rax
1:      ret
        trapped GP
        check   "error code", [seen_frame], 0
        check   "RIP", [seen_frame+8], "offset 1b"

# ---- compatibility mode ---------------------------------------------------------------------------------------------

        experiment "In compatibility mode code is 32-bit, and exceptions have 64-bit frames"
        attempt ring=3, bits=32
        mov     eax, -1
        inc     eax                     # in 64-bit mode this byte would be a prefix
        push    0x1234
1:      caught  NOTHING, rip=1b, ring=3, cs=USER_CODE_32, rsp=user_stack_top-4
        check_bits "EAX", [seen_rax], -1, 0
        mov     ecx, [user_stack_top - 4]
        check   "pushed", rcx, 0x1234

        experiment "It leaves R8 to R15 alone"
        mov     r8, 0x1234567876543210
        mov     r15, r8
        attempt ring=3, bits=32
        nop
1:      caught  NOTHING, rip=1b, ring=3, cs=USER_CODE_32
        mov     rcx, 0x1234567876543210
        check   "R8", [seen_r8], rcx
        mov     rcx, 0x1234567876543210
        check   "R15", [seen_r15], rcx

        experiment "INT works there"
        attempt ring=3, bits=32
        int     OPEN
1:      caught  OPEN, rip=1b, ring=3, cs=USER_CODE_32

        experiment "Addresses there have 32 bits"
        mov     dword ptr [scratch], 0x600DF00D
        attempt ring=3, bits=32
        mov     eax, USER_DATA
        mov     ds, eax
        mov     ebx, offset scratch + 0x10
        mov     eax, [ebx + 0xFFFFFFF0]
1:      caught  NOTHING, rip=1b, ring=3, cs=USER_CODE_32
        check   "EAX", [seen_rax], 0x600DF00D

# ---- what 64-bit mode does not know ---------------------------------------------------------------------------------

        .macro undefined bytes:vararg
        attempt
1:      .byte   \bytes
        caught  UD, rip=1b
        .endm

        experiment "Instructions of old are #UD"
        undefined 0x06                  # push es
        undefined 0x07                  # pop es
        undefined 0x27                  # daa
        undefined 0x37                  # aaa
        undefined 0x60                  # pusha
        undefined 0x61                  # popa
        undefined 0x62, 0x03            # bound
        undefined 0x82, 0xC0, 0x00      # add al, 0
        undefined 0x9A, 0, 0, 0, 0, 8, 0        # call far
        undefined 0xC4, 0x03            # les
        undefined 0xC5, 0x03            # lds
        undefined 0xCE                  # into
        undefined 0xD4, 0x0A            # aam
        undefined 0xD5, 0x0A            # aad
        undefined 0xD6                  # salc
        undefined 0xEA, 0, 0, 0, 0, 8, 0        # jmp far

        experiment "Data segments have no base, no limit, and may be null"
        xor     ecx, ecx
        mov     ds, ecx
        mov     rcx, [scratch]
        mov     eax, SHORT_DATA
        mov     es, eax
        mov     dword ptr [scratch], 0x600DF00D
        attempt
        mov     ecx, es:[scratch]
1:      caught  NOTHING, rip=1b
        check   "read through ES", [seen_rcx], 0x600DF00D
        mov     eax, KERNEL_DATA
        mov     ds, eax
        mov     es, eax

        jmp     finish

.section .data
.balign 8
scratch:        .quad 0
