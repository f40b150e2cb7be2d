# v86.s: virtual-8086 mode: an 8086 inside a protected system.
#
# Mirrors: Intel SDM volume 3B, chapter 21 "8086 emulation", 21.2 and 21.3.
#
# The code between `attempt_v86` and `caught_v86` is 16-bit code of an 8086: segments are addresses / 16, nothing is
# looked up. But it runs at level 3, and what would reach beyond it comes to level 0, with all segments in the frame:
#
#       [error code]  EIP  CS  EFLAGS  ESP  SS  ES  DS  FS  GS

.include "base.inc"
.include "pages.inc"

# Where the 8086's segments are: SS begins at 100h, so its SP is 100h less than the address; CS begins at 0.
.equ V86_CS, 0
.equ V86_SS, 0x10
.equ V86_ES, 0xEEEE
.equ V86_FS, 0xFFFF
.equ V86_GS, 0x0001

# Begins as `attempt` does, with 8086 code. Changes EAX.
.macro attempt_v86 flags=0, iopl=3, ds=0, esp=user_stack_top-0x100
        mov     dword ptr [resume_eip], offset 77f
        mov     [resume_esp], esp
        push    V86_GS
        push    V86_FS
        push    \ds
        push    V86_ES
        push    V86_SS
        push    offset \esp
        push    FLAG_VM + 2 + (\flags) + (\iopl) * 0x1000
        push    V86_CS
        push    offset 78f
        iretd
.code16
78:
.endm

# Ends as `caught` does. `ip` is where it was, `sp` what was on the stack of the 8086.
.macro caught_v86 vector, error=none, ip=0, set=0, clear=0, esp=user_stack_top-0x100, cs=V86_CS
        .ifc \error,none
        .set    frame, seen_frame
        .else
        .set    frame, seen_frame + 4
        .endif
.code32
        caught  \vector, \error, \ip, 3, \cs, FLAG_VM|(\set), \clear, ring0_stack_top-16, \esp, V86_SS
        check   "saved ES", [frame+20], V86_ES
        check   "saved FS", [frame+28], V86_FS
        check   "saved GS", [frame+32], V86_GS
        check_bits "VM in the handler", [seen_eflags], FLAG_VM, 0
.endm

segment OTHER, PRESENT+TSS_32, 0, other, 0xFF
segment MAPPED_TSS, PRESENT+TSS_32, 0, mapped_tss, mapped_tss_size-1
segment CONFORMING, 0b10011110
segment CODE_1_0, 0b10111010

vector OPEN, INTERRUPT_GATE_32, dpl=3
vector OPEN_TRAP, TRAP_GATE_32, dpl=3
vector KERNEL_ONLY, INTERRUPT_GATE_32
vector WORDS, INTERRUPT_GATE_16, dpl=3
vector TO_CONFORMING, INTERRUPT_GATE_32, selector=CONFORMING, dpl=3
vector TO_RING_1, INTERRUPT_GATE_32, selector=CODE_1_0, dpl=3
vector TASK, TASK_GATE, OTHER, 0x8000, dpl=3

.section .data
.balign 16
words:  .word   0x1111, 0x2222, 0x3333, 0x4444
far_pointer:
        .word   0x1234, 0xABCD

# A TSS with an I/O permission bit map (figure 19-2): a 1 forbids a port. One more byte of ones ends it.
.balign 4
mapped_tss:
        .long   0, ring0_stack_top, KERNEL_DATA
        .skip   102 - (. - mapped_tss)
        .word   io_map - mapped_tss
io_map: .skip   0x80 / 8, 0xFF
        .byte   0xFE, 0xFF              # port 80h is allowed, 81h is not
        .skip   0x10, 0xFF
.equ mapped_tss_size, . - mapped_tss

.equ TSS_EIP, 32
.equ TSS_EFLAGS, 36
.equ TSS_ESP, 56
.equ TSS_ES, 72
.equ TSS_CS, 76
.equ TSS_SS, 80
.equ TSS_DS, 84
.equ TSS_FS, 88
.equ TSS_GS, 92
.balign 4
other:  .skip   0x100

.section .bss
        .skip   512
other_stack_top:

.section .text
main:

# ---- in and out -----------------------------------------------------------------------------------------------------

        experiment "IRET with VM in the flags makes an 8086; an exception saves all its segments"
        attempt_v86 flags=FLAG_IF+FLAG_DF, ds=0x7777
1:      caught_v86 NOTHING, ip=1b, set=FLAG_IF+FLAG_DF+FLAG_IOPL
        check   "saved DS", [seen_frame+24], 0x7777

        experiment "In the handler the data segments are null"
        attempt_v86
        caught_v86 NOTHING
        check   "DS", [seen_ds], 0
        check   "ES", [seen_es], 0
        check   "FS", [seen_fs], 0
        check   "GS", [seen_gs], 0
        check   "CS", [seen_cs], KERNEL_CODE
        check   "SS", [seen_ss], KERNEL_DATA

        experiment "With an error code the frame is one word longer"
        attempt_v86
1:      hlt
        caught_v86 GP, error=0, ip=1b

        experiment "IRET loads all of ESP, and the frame has all of it"
        attempt_v86 esp=0x12340000+user_stack_top-0x100
1:      caught_v86 NOTHING, ip=1b, esp=0x12340000+user_stack_top-0x100

        experiment "IRET does not go to an IP beyond FFFFh: #GP(0)"
        attempt
        push    V86_GS
        push    V86_FS
        push    0
        push    V86_ES
        push    V86_SS
        push    offset user_stack_top - 0x100
        push    FLAG_VM + 2
        push    V86_CS
        push    offset 0x10000 + 2f
1:      iretd
2:      trapped GP
        check   "error code", [seen_frame], 0
        check   "EIP", [seen_frame+4], "offset 1b"

        experiment "POPF leaves VM alone, even at level 0"
        attempt
        push    FLAG_VM + 2
        popfd
1:      caught  NOTHING, eip=1b, clear=FLAG_VM

# ---- segments as on the 8086 ----------------------------------------------------------------------------------------

        experiment "A segment is its selector times 16"
        mov     ecx, offset words
        shr     ecx, 4
        attempt_v86
        mov     ds, cx
        mov     ax, [2]
        mov     es, cx
        mov     dx, es:[6]
        mov     cx, 0xEEEE
        mov     es, cx
        caught_v86 NOTHING
        check_bits "read through DS", [seen_eax], 0xFFFF, 0x2222
        check_bits "read through ES", [seen_edx], 0xFFFF, 0x4444

        experiment "Any selector will do; LDS loads one"
        attempt_v86
        lds     si, [far_pointer]
        caught_v86 NOTHING
        check_bits "SI", [seen_esi], 0xFFFF, 0x1234
        check   "DS", [seen_frame+24], 0xABCD

        experiment "The stack is where SS says"
        attempt_v86
        push    0x1234
        push    0x5678
1:      caught_v86 NOTHING, ip=1b, esp=user_stack_top-0x100-4
        check   "pushed", [user_stack_top-4], 0x12345678

        experiment "A far jump takes a segment, not a selector"
        attempt_v86
        push    0x10                    # 0010:1f - 100h is the same place as 0000:1f
        push    offset 1f - 0x100
        retf
1:      ud2
        caught_v86 UD, cs=0x10
        check   "IP", [seen_frame], "offset 1b - 0x100"

        experiment "A far call pushes the segment"
        attempt_v86
        .byte   0x9A                    # CALL ptr16:16
        .word   1f - 0x100, 0x10
2:
1:      ud2
        caught_v86 UD, cs=0x10, esp=user_stack_top-0x100-4
        check   "pushed", [user_stack_top-4], "offset 2b"

        .macro beyond text, vector, instruction:vararg
        experiment "\text"
        mov     esi, 0xFFFF
        attempt_v86 esp=1
1:      \instruction
        caught_v86 \vector, error=0, ip=1b, esp=1
        .endm

        beyond "A segment ends at FFFFh: #GP(0) for a word there", GP, mov ax, [si]
        beyond "An address of 32 bits is beyond it, too", GP, mov al, [esi+1]
        beyond "A stack ends there as well: #SS(0)", STACK_FAULT, push ax
        beyond "SS has the same limit for data: #SS(0)", STACK_FAULT, mov ax, ss:[si]

        experiment "Its level is 3: a page of the supervisor's is #PF"
        call    paging_on
        and     dword ptr [page_table + 4 * 0x10], ~PAGE_USER
        attempt_v86 ds=0x1000
1:      mov     al, [0x234]
        caught_v86 PF, error=PF_PRESENT+PF_USER, ip=1b
        check   "CR2", [seen_cr2], 0x10234
        call    paging_off

# ---- IOPL (21.2.8.1) ------------------------------------------------------------------------------------------------

        experiment "With IOPL 3 CLI and STI work"
        attempt_v86 flags=FLAG_IF
        cli
1:      caught_v86 NOTHING, ip=1b, clear=FLAG_IF
        attempt_v86
        sti
1:      caught_v86 NOTHING, ip=1b, set=FLAG_IF

        experiment "PUSHF pushes IF and IOPL; PUSHFD neither VM nor RF"
        attempt_v86 flags=FLAG_IF
        pushf
        pushfd
1:      caught_v86 NOTHING, ip=1b, esp=user_stack_top-0x100-6
        check   "PUSHFD", [user_stack_top-6], 2+FLAG_IF+FLAG_IOPL
        check_bits "PUSHF", [user_stack_top-2], 0xFFFF, 2+FLAG_IF+FLAG_IOPL

        experiment "POPF sets IF, but neither IOPL nor VM"
        attempt_v86
        push    2 | FLAG_IF
        popf
1:      caught_v86 NOTHING, ip=1b, set=FLAG_IF+FLAG_IOPL
        attempt_v86 flags=FLAG_IF
        pushd   2
        popfd
1:      caught_v86 NOTHING, ip=1b, set=FLAG_IOPL, clear=FLAG_IF

        experiment "IRET pops three words, and stays in the mode, whatever NT says"
        attempt_v86 flags=FLAG_NT
        push    2 | FLAG_IF
        push    0x10
        push    offset 1f - 0x100
        iret
1:      ud2
        caught_v86 UD, cs=0x10, set=FLAG_IF+FLAG_IOPL, clear=FLAG_NT
        check   "IP", [seen_frame], "offset 1b - 0x100"

        experiment "INT n goes through the gate, to level 0"
        attempt_v86 flags=FLAG_IF
        int     OPEN
1:      caught_v86 OPEN, ip=1b, set=FLAG_IF
        check_bits "IF in the handler", [seen_eflags], FLAG_IF, 0
        attempt_v86 flags=FLAG_IF+FLAG_NT
        int     OPEN_TRAP
1:      caught_v86 OPEN_TRAP, ip=1b, set=FLAG_IF+FLAG_NT
        check_bits "IF and NT in the handler", [seen_eflags], FLAG_IF+FLAG_NT, FLAG_IF

        experiment "INT n, INT3 and INTO need a gate of DPL 3"
        attempt_v86
1:      int     KERNEL_ONLY
        caught_v86 GP, error=KERNEL_ONLY*8+IDT, ip=1b
        attempt_v86
1:      int3
        caught_v86 GP, error=BREAKPOINT*8+IDT, ip=1b
        attempt_v86
        mov     al, 0x7F
        inc     al
1:      into
        caught_v86 GP, error=OF*8+IDT, ip=1b

        experiment "A gate must lead to level 0: #GP with the code segment"
        attempt_v86
1:      int     TO_RING_1
        caught_v86 GP, error=CODE_1_0, ip=1b

        experiment "Not to conforming code either, which would run at level 3"
        attempt_v86
1:      int     TO_CONFORMING
        caught_v86 GP, error=CONFORMING, ip=1b

        experiment "A 16-bit gate pushes nine words"
        attempt_v86 ds=0x7777, esp=0x6543
        int     WORDS
1:
.code32
        trapped WORDS
        check   "CS:IP", [seen_frame], "offset 1b + (V86_CS << 16)"
        check   "SP:FLAGS", [seen_frame+4], 0x65433002
        check   "ES:SS", [seen_frame+8], V86_SS+(V86_ES<<16)
        check   "FS:DS", [seen_frame+12], 0x7777+(V86_FS<<16)
        check_bits "GS", [seen_frame+16], 0xFFFF, V86_GS
        check   "stack", [seen_esp], "offset ring0_stack_top - 18"

        .macro iopl_sensitive instruction:vararg
        attempt_v86 iopl=2
1:      \instruction
        caught_v86 GP, error=0, ip=1b
        .endm

        experiment "With IOPL 2 CLI and STI are #GP(0)"
        iopl_sensitive cli
        iopl_sensitive sti
        experiment "So are PUSHF and POPF"
        iopl_sensitive pushf
        iopl_sensitive popf
        iopl_sensitive pushfd
        iopl_sensitive popfd
        experiment "So is IRET"
        iopl_sensitive iret
        iopl_sensitive iretd
        experiment "So is INT n, whatever the gate"
        iopl_sensitive int OPEN
        iopl_sensitive int KERNEL_ONLY
        iopl_sensitive int 0xF0

        experiment "INT3 does not ask for IOPL"
        mov     byte ptr [idt + 8 * BREAKPOINT + 5], PRESENT + DPL_3 + INTERRUPT_GATE_32
        attempt_v86 iopl=0
        int3
1:      caught_v86 BREAKPOINT, ip=1b
        mov     byte ptr [idt + 8 * BREAKPOINT + 5], PRESENT + INTERRUPT_GATE_32

# ---- what an 8086 may not -------------------------------------------------------------------------------------------

        .macro privileged instruction:vararg
        attempt_v86
1:      \instruction
        caught_v86 GP, error=0, ip=1b
        .endm

        experiment "What is for level 0 is #GP(0)"
        privileged hlt
        privileged mov eax, cr0
        privileged mov cr0, eax
        privileged mov eax, dr7
        privileged clts
        privileged lgdt [0]
        privileged lidt [0]
        privileged lmsw ax
        privileged invlpg [0]

        .macro undefined instruction:vararg
        attempt_v86
1:      \instruction
        caught_v86 UD, ip=1b
        .endm

        experiment "What only makes sense with selectors is #UD"
        undefined sldt ax
        undefined str ax
        undefined lldt ax
        undefined ltr ax
        undefined lar ax, ax
        undefined lsl ax, ax
        undefined verr ax
        undefined verw ax
        undefined arpl ax, ax

        experiment "Exceptions are those of any program"
        attempt_v86
        xor     cx, cx
1:      div     cx
        caught_v86 DE, ip=1b
        attempt_v86
        mov     cx, -1
1:      bound   cx, dword ptr [words]
        caught_v86 BR, ip=1b

# ---- I/O (19.5.2) ---------------------------------------------------------------------------------------------------

        experiment "Ports are up to the map in the TSS alone; without one IN is #GP(0) though IOPL be 3"
        attempt_v86
1:      in      al, 0x80
        caught_v86 GP, error=0, ip=1b

        experiment "A 0 in the map allows a port though IOPL be 0, a 1 forbids it"
        mov     eax, MAPPED_TSS
        ltr     ax
        attempt_v86 iopl=0
        out     0x80, al
1:      caught_v86 NOTHING, ip=1b
        attempt_v86
1:      out     0x81, al
        caught_v86 GP, error=0, ip=1b

        experiment "A word needs both of its ports"
        attempt_v86
1:      out     0x80, ax
        caught_v86 GP, error=0, ip=1b
        mov     byte ptr [gdt + KERNEL_TSS + 5], PRESENT + TSS_32
        mov     eax, KERNEL_TSS
        ltr     ax

# ---- tasks (21.2.5) -------------------------------------------------------------------------------------------------

        .macro prepare_8086_task begins_at
        mov     dword ptr [other + 4], offset other_stack_top
        mov     dword ptr [other + 8], KERNEL_DATA
        mov     dword ptr [other + TSS_EIP], offset \begins_at
        mov     dword ptr [other + TSS_EFLAGS], FLAG_VM + FLAG_IOPL + 2
        mov     dword ptr [other + TSS_ESP], offset user_stack_top - 0x100
        mov     dword ptr [other + TSS_CS], V86_CS
        mov     dword ptr [other + TSS_SS], V86_SS
        mov     dword ptr [other + TSS_DS], 0x7777
        mov     dword ptr [other + TSS_ES], V86_ES
        mov     dword ptr [other + TSS_FS], V86_FS
        mov     dword ptr [other + TSS_GS], V86_GS
        .endm

        # Back to our own task, nobody else busy.
        .macro home
        mov     byte ptr [gdt + OTHER + 5], PRESENT + TSS_32
        mov     byte ptr [gdt + KERNEL_TSS + 5], PRESENT + TSS_32
        mov     eax, KERNEL_TSS
        ltr     ax
        clts
        .endm

        experiment "A task whose TSS has VM in its flags is an 8086"
        prepare_8086_task in_8086_task
        attempt
        .byte   0xEA
        .long   0
        .word   OTHER
        .set    v86_esp, user_stack_top - 0x100
        caught  UD, eip=in_8086_task, ring=3, cs=V86_CS, set=FLAG_VM, from=other_stack_top-16, user_esp=v86_esp, ss=0x10
        check   "saved ES", [seen_frame+20], V86_ES
        check   "saved DS", [seen_frame+24], 0x7777
        check   "saved FS", [seen_frame+28], V86_FS
        check   "saved GS", [seen_frame+32], V86_GS
        home
        jmp     1f
.code16
in_8086_task:
        ud2
.code32
1:

        experiment "A task gate leads out of the mode, and IRET with NT back into it"
        mov     dword ptr [other + TSS_EIP], offset returns_to_8086
        mov     dword ptr [other + TSS_EFLAGS], 2
        mov     dword ptr [other + TSS_ESP], offset other_stack_top
        mov     dword ptr [other + TSS_CS], KERNEL_CODE
        mov     eax, KERNEL_DATA
        mov     [other + TSS_SS], eax
        mov     [other + TSS_DS], eax
        mov     [other + TSS_ES], eax
        mov     [other + TSS_FS], eax
        mov     [other + TSS_GS], eax
        attempt_v86 ds=0x7777
        int     TASK
1:      caught_v86 NOTHING, ip=1b, clear=FLAG_NT
        check   "saved DS", [seen_frame+24], 0x7777
        check   "EFLAGS in our TSS", [tss+TSS_EFLAGS], 2+FLAG_VM+FLAG_IOPL
        check   "CS in our TSS", [tss+TSS_CS], V86_CS
        check   "DS in our TSS", [tss+TSS_DS], 0x7777
        check   "GS in our TSS", [tss+TSS_GS], V86_GS
        home
        jmp     1f
returns_to_8086:
        iretd
1:

        experiment "At level 3 IRET leaves VM alone"
        attempt ring=3
        push    FLAG_VM + 2
        push    USER_CODE
        push    offset 1f
        iretd
1:      caught  NOTHING, eip=1b, ring=3, clear=FLAG_VM

        jmp     finish
        .skip   USER_CODE * 16, 0xF4    # HLT: who made an 8086 of it would go on in here, not in our memory
