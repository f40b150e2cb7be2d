# tasks.s: task switches in hardware: what they save and load, what they check, and how they end.
#
# Mirrors: Intel SDM volume 3A, chapter 7 "Task management".
#
# Two tasks take part: the one that experiments run in (its TSS is `tss` of base.inc), and `other`. That begins anew
# in each experiment, with a different number in each register, at the code that the experiment names. Like everything
# else it ends with an exception, which finds its handler through an interrupt gate, in whatever task it occurs.
#
#                  JMP        CALL, INT, exception            IRET (with NT set)
#   old task       not busy   stays busy                      not busy, NT = 0 in its saved EFLAGS
#   new task       busy       busy, NT = 1, link = old task   was busy, and stays so

.include "base.inc"
.include "pages.inc"

# ---- a TSS (figures 7-2 and 7-10) -----------------------------------------------------------------------------------

.equ TSS_LINK, 0                        # the task to go back to
.equ TSS_ESP0, 4
.equ TSS_SS0, 8
.equ TSS_CR3, 28
.equ TSS_EIP, 32
.equ TSS_EFLAGS, 36
.equ TSS_EAX, 40                        # EAX ECX EDX EBX ESP EBP ESI EDI
.equ TSS_ECX, 44
.equ TSS_EBX, 52
.equ TSS_ESP, 56
.equ TSS_EDI, 68
.equ TSS_ES, 72                         # ES CS SS DS FS GS
.equ TSS_CS, 76
.equ TSS_SS, 80
.equ TSS_DS, 84
.equ TSS_FS, 88
.equ TSS_GS, 92
.equ TSS_LDT, 96
.equ TSS_TRAP, 100                      # bit 0, T: stop with #DB when the task has begun
.equ TSS_SIZE, 104

# That of the 80286: all words.
.equ TSS16_SP0, 2
.equ TSS16_SS0, 4
.equ TSS16_IP, 14
.equ TSS16_FLAGS, 16
.equ TSS16_AX, 18                       # AX CX DX BX SP BP SI DI
.equ TSS16_SP, 26
.equ TSS16_DI, 32
.equ TSS16_ES, 34                       # ES CS SS DS
.equ TSS16_CS, 36
.equ TSS16_SS, 38
.equ TSS16_DS, 40
.equ TSS16_LDT, 42
.equ TSS16_SIZE, 44

.equ CR0_TS, 1 << 3
.equ DR6_BT, 1 << 15
.equ DR6_NONE, 0xFFFF0FF0

segment OTHER, PRESENT+TSS_32, 0, other, TSS_SIZE-1
segment DOCTOR, PRESENT+TSS_32, 0, doctor, TSS_SIZE-1
segment OTHER_16, PRESENT+TSS_16, 0, other_16, TSS16_SIZE-1
segment OTHER_ABSENT, TSS_32, 0, other, TSS_SIZE-1
segment OTHER_SHORT, PRESENT+TSS_32, 0, other, TSS_SIZE-2
segment OTHER_16_SHORT, PRESENT+TSS_16, 0, other_16, TSS16_SIZE-2
segment OTHER_USER, PRESENT+DPL_3+TSS_32, 0, other, TSS_SIZE-1
segment LOCAL, PRESENT+TABLE_LDT, 0, local_table, 7
segment LOCAL_ABSENT, TABLE_LDT, 0, local_table, 7
segment ABSENT_CODE, 0b00011010
segment ABSENT_DATA, 0b00010010
segment ABSENT_DATA_3, 0b01110010
segment DATA_16, 0b10010010, 0, 0, 0xFFFF       # a stack here is 16 bits wide
segment SHORT_CODE, 0b10011010, 0b0100, 0, 0xFF
.equ BEYOND, 0xFF8
.equ IN_LDT, 4                          # the selector of the only segment in LOCAL

call_gate GATE, TASK_GATE, OTHER, 0, dpl=3
call_gate GATE_KERNEL_ONLY, TASK_GATE, OTHER, 0
call_gate GATE_ABSENT, TASK_GATE, OTHER, 0, present=0
call_gate GATE_TO_NULL, TASK_GATE, 0, 0
call_gate GATE_TO_LDT, TASK_GATE, IN_LDT, 0
call_gate GATE_TO_BEYOND, TASK_GATE, BEYOND, 0
call_gate GATE_TO_DATA, TASK_GATE, KERNEL_DATA, 0
call_gate GATE_TO_ABSENT, TASK_GATE, OTHER_ABSENT, 0
call_gate GATE_TO_SELF, TASK_GATE, KERNEL_TSS, 0

vector TASK, TASK_GATE, OTHER, 0x8000, dpl=3    # a task gate has no offset
vector TASK_KERNEL_ONLY, TASK_GATE, OTHER, 0x8000
vector TASK_ABSENT, TASK_GATE, OTHER, 0x8000, present=0
vector TASK_TO_ABSENT, TASK_GATE, OTHER_ABSENT, 0x8000
vector TASK_TO_SELF, TASK_GATE, KERNEL_TSS, 0x8000
vector TASK_TO_DATA, TASK_GATE, KERNEL_DATA, 0x8000
vector TASK_TO_BEYOND, TASK_GATE, BEYOND, 0x8000

.section .data
.balign 8
local_table:
        descriptor 0b10010010, 0b1100
.balign 4
other:          .skip TSS_SIZE
other_16:       .skip TSS16_SIZE
doctor:         .skip TSS_SIZE
.section .bss
        .skip   512
other_stack_top:
        .skip   512
other_ring0_stack_top:
        .skip   512
doctor_stack_top:
.section .pages
other_directory: .skip 4096
other_table:    .skip 4096

# ---- the other task -------------------------------------------------------------------------------------------------

.section .text
# Makes all TSSs new, with EAX = where the task begins, and us the task that runs. Changes EAX, ECX, EDX, EDI.
prepare_other:
        mov     edx, eax
        mov     byte ptr [gdt + OTHER + 5], PRESENT + TSS_32            # nobody is busy ...
        mov     byte ptr [gdt + OTHER_16 + 5], PRESENT + TSS_16
        mov     byte ptr [gdt + DOCTOR + 5], PRESENT + TSS_32
        mov     byte ptr [gdt + KERNEL_TSS + 5], PRESENT + TSS_32
        mov     eax, KERNEL_TSS
        ltr     ax                                                      # ... but us
        xor     eax, eax
        lldt    ax
        clts
        mov     word ptr [tss + TSS_LINK], 0

        mov     edi, offset other
        mov     ecx, TSS_SIZE / 4
        xor     eax, eax
        rep stosd
        mov     word ptr [other + TSS_LINK], BEYOND                     # nowhere
        mov     dword ptr [other + TSS_ESP0], offset other_ring0_stack_top
        mov     dword ptr [other + TSS_SS0], KERNEL_DATA
        mov     [other + TSS_EIP], edx
        mov     dword ptr [other + TSS_EFLAGS], 2
        mov     edi, offset other + TSS_EAX
        mov     eax, 0x11110000
1:      stosd
        add     eax, 0x11110001
        cmp     edi, offset other + TSS_ES
        jne     1b
        mov     dword ptr [other + TSS_ESP], offset other_stack_top
        mov     dword ptr [other + TSS_CS], KERNEL_CODE
        mov     eax, KERNEL_DATA
        mov     [other + TSS_ES], eax
        mov     [other + TSS_SS], eax
        mov     [other + TSS_DS], eax
        mov     [other + TSS_FS], eax
        mov     [other + TSS_GS], eax

        mov     dword ptr [doctor + TSS_EIP], offset doctor_ends
        mov     dword ptr [doctor + TSS_EFLAGS], 2
        mov     dword ptr [doctor + TSS_ESP], offset doctor_stack_top
        mov     dword ptr [doctor + TSS_CS], KERNEL_CODE
        mov     [doctor + TSS_SS], eax
        mov     [doctor + TSS_DS], eax

        mov     edi, offset other_16
        mov     ecx, TSS16_SIZE / 4
        xor     eax, eax
        rep stosd
        mov     word ptr [other_16 + TSS_LINK], BEYOND
        mov     word ptr [other_16 + TSS16_SP0], offset other_ring0_stack_top
        mov     word ptr [other_16 + TSS16_SS0], KERNEL_DATA
        mov     [other_16 + TSS16_IP], dx
        mov     word ptr [other_16 + TSS16_FLAGS], 2
        mov     edi, offset other_16 + TSS16_AX
        mov     eax, 0x2000
1:      stosw
        add     eax, 0x0101
        cmp     edi, offset other_16 + TSS16_ES
        jne     1b
        mov     word ptr [other_16 + TSS16_SP], offset other_stack_top
        mov     word ptr [other_16 + TSS16_CS], KERNEL_CODE
        mov     eax, KERNEL_DATA
        mov     [other_16 + TSS16_ES], ax
        mov     word ptr [other_16 + TSS16_SS], DATA_16
        mov     [other_16 + TSS16_DS], ax
        ret

.macro prepare begins_at
        mov     eax, offset \begins_at
        call    prepare_other
.endm

# The other task shall be one of level 3.
.macro to_level_3
        mov     eax, USER_DATA
        mov     dword ptr [other + TSS_CS], USER_CODE
        mov     [other + TSS_SS], eax
        mov     [other + TSS_DS], eax
        mov     [other + TSS_ES], eax
        mov     [other + TSS_FS], eax
        mov     [other + TSS_GS], eax
.endm

# A 16-bit task ends: what is in the upper half of ESP is not defined, and `trap` would use it.
other_16_ends:
        movzx   esp, sp
        ud2

doctor_ends:
        ud2

# What the other task does: it ends at once; or it goes back, and ends when it is called again.
other_ends:
        ud2
other_returns:
        iretd
other_returned:
        ud2

.macro call_far selector, offset=0
        .byte   0x9A                    # CALL ptr16:32
        .long   \offset
        .word   \selector
.endm

.macro jump_far selector, offset=0
        .byte   0xEA                    # JMP ptr16:32
        .long   \offset
        .word   \selector
.endm

# Compares the busy bits, 2 or 0, of both tasks' descriptors.
.macro check_busy ours, others, which=OTHER
        movzx   ecx, byte ptr [gdt + KERNEL_TSS + 5]
        check_bits "our busy bit", ecx, TSS_BUSY, \ours
        movzx   ecx, byte ptr [gdt + \which + 5]
        check_bits "the other's busy bit", ecx, TSS_BUSY, \others
.endm

.macro check_tr selector
        str     ecx
        check   "TR", ecx, \selector
.endm

# Compares a word in memory.
.macro check_word what, address, expected
        movzx   ecx, word ptr \address
        check   "\what", ecx, "\expected"
.endm

# ---- JMP ------------------------------------------------------------------------------------------------------------

main:
        experiment "JMP to a TSS loads all registers from it"
        prepare other_ends
        mov     dword ptr [other + TSS_EFLAGS], 2 + FLAG_DF + FLAG_IOPL + FLAG_CF
        attempt
        jump_far OTHER, 0xDEADBEEF      # a task begins where its TSS says
        caught  UD, eip=other_ends, from=other_stack_top, set=FLAG_DF+FLAG_IOPL+FLAG_CF, clear=FLAG_NT
        check   "EAX", [seen_eax], 0x11110000
        check   "ECX", [seen_ecx], 0x22220001
        check   "EDX", [seen_edx], 0x33330002
        check   "EBX", [seen_ebx], 0x44440003
        check   "EBP", [seen_ebp], 0x66660005
        check   "ESI", [seen_esi], 0x77770006
        check   "EDI", [seen_edi], 0x88880007
        check_tr OTHER

        experiment "It changes who is busy, sets no link and no NT, and sets CR0.TS"
        prepare other_ends
        attempt
        jump_far OTHER
        caught  UD, eip=other_ends, from=other_stack_top, clear=FLAG_NT
        check_busy 0, TSS_BUSY
        check_word "link", [other+TSS_LINK], BEYOND
        mov     ecx, cr0
        check_bits "TS", ecx, CR0_TS, CR0_TS

        experiment "It saves our registers in our TSS"
        prepare other_ends
        .macro our_registers            # EAX is used up by the macros
        xor     ecx, ecx
        mov     gs, ecx
        mov     ecx, 0x99990001
        mov     edx, 0x99990002
        mov     ebx, 0x99990003
        mov     ebp, 0x99990005
        mov     esi, 0x99990006
        mov     edi, 0x99990007
        .endm
        our_registers
        attempt flags=FLAG_DF+FLAG_CF
        mov     eax, 0x99990000
        jump_far OTHER
1:      caught  UD, eip=other_ends, from=other_stack_top
        .macro check_saved
        check   "saved EFLAGS", [tss+TSS_EFLAGS], 2+FLAG_DF+FLAG_CF
        mov     ecx, 0x99990000
        mov     ebx, offset tss + TSS_EAX
2:      cmp     ebx, offset tss + TSS_ESP
        je      3f
        check   "saved register", [ebx], ecx
3:      add     ebx, 4
        inc     ecx
        cmp     ebx, offset tss + TSS_ES
        jne     2b
        check   "saved ESP", [tss+TSS_ESP], [resume_esp]
        check   "saved CS", [tss+TSS_CS], KERNEL_CODE
        check   "saved SS", [tss+TSS_SS], KERNEL_DATA
        check   "saved DS", [tss+TSS_DS], KERNEL_DATA
        check   "saved ES", [tss+TSS_ES], KERNEL_DATA
        check   "saved FS", [tss+TSS_FS], KERNEL_DATA
        check   "saved GS", [tss+TSS_GS], 0
        .endm
        check_saved
        check   "saved EIP", [tss+TSS_EIP], "offset 1b"

        experiment "JMP through a task gate does the same"
        prepare other_ends
        our_registers
        attempt flags=FLAG_DF+FLAG_CF
        mov     eax, 0x99990000
        jump_far GATE, 0xDEADBEEF
1:      caught  UD, eip=other_ends, from=other_stack_top, clear=FLAG_NT
        check_saved
        check   "saved EIP", [tss+TSS_EIP], "offset 1b"
        check_tr OTHER
        check_busy 0, TSS_BUSY

# ---- CALL and IRET --------------------------------------------------------------------------------------------------

        experiment "CALL leaves us busy, links the new task to us, and sets NT in it"
        prepare other_ends
        our_registers
        attempt flags=FLAG_DF+FLAG_CF
        mov     eax, 0x99990000
        call_far OTHER
1:      caught  UD, eip=other_ends, from=other_stack_top, set=FLAG_NT
        check_saved
        check   "saved EIP", [tss+TSS_EIP], "offset 1b"
        check_busy TSS_BUSY, TSS_BUSY
        check_word "link", [other+TSS_LINK], KERNEL_TSS
        check_tr OTHER

        experiment "IRET with NT set goes back to the task before"
        prepare other_returns
        our_registers
        attempt flags=FLAG_DF+FLAG_CF
        mov     eax, 0x99990000
        call_far OTHER
1:      caught  NOTHING, eip=1b, set=FLAG_DF+FLAG_CF, clear=FLAG_NT
        check   "EAX", [seen_eax], 0x99990000
        check   "ECX", [seen_ecx], 0x99990001
        check   "EBX", [seen_ebx], 0x99990003
        check   "EDI", [seen_edi], 0x99990007
        check_tr KERNEL_TSS
        check_busy TSS_BUSY, 0
        check   "the other's saved EIP", [other+TSS_EIP], "offset other_returned"
        check   "the other's saved EFLAGS", [other+TSS_EFLAGS], 2

        experiment "A task that has gone back goes on behind its IRET when it is called again"
        attempt
        call_far OTHER
        caught  UD, eip=other_returned, from=other_stack_top, set=FLAG_NT

        experiment "IRET looks at NT, not at how the task began"
        prepare other_returns
        mov     dword ptr [other + TSS_EFLAGS], 2 + FLAG_NT
        mov     word ptr [other + TSS_LINK], KERNEL_TSS
        attempt
        mov     byte ptr [gdt + OTHER + 5], PRESENT + TSS_32
        jump_far OTHER                  # we are not busy now, so there is no way back
        caught  TS, error=KERNEL_TSS, eip=other_returns, from=other_stack_top

        experiment "The link in the TSS of a task that is called replaces what was there"
        prepare other_returns
        mov     word ptr [other + TSS_LINK], KERNEL_DATA
        attempt
        call_far OTHER
1:      caught  NOTHING, eip=1b

        experiment "A task of level 3 is called from level 3, and returns there"
        prepare other_user_returns
        to_level_3
        attempt ring=3, flags=FLAG_IF
        call_far GATE
1:      caught  NOTHING, eip=1b, ring=3, set=FLAG_IF, clear=FLAG_NT
        check   "the other's saved EIP", [other+TSS_EIP], "offset other_user_returned"
        jmp     1f
other_user_returns:
        iretd
other_user_returned:
        ud2
1:

# ---- INT and exceptions through a task gate -------------------------------------------------------------------------

        experiment "INT through a task gate calls the task"
        prepare other_ends
        our_registers
        attempt flags=FLAG_DF+FLAG_CF
        mov     eax, 0x99990000
        int     TASK
1:      caught  UD, eip=other_ends, from=other_stack_top, set=FLAG_NT
        check_saved
        check   "saved EIP", [tss+TSS_EIP], "offset 1b"
        check_busy TSS_BUSY, TSS_BUSY
        check_word "link", [other+TSS_LINK], KERNEL_TSS

        experiment "It loads IF from the TSS: a task gate neither turns interrupts off nor on"
        prepare other_ends
        mov     dword ptr [other + TSS_EFLAGS], 2 + FLAG_IF
        attempt ring=3
        int     TASK
        caught  UD, eip=other_ends, from=other_stack_top, set=FLAG_NT+FLAG_IF

        experiment "An interrupt's task comes back to level 3"
        prepare other_returns
        attempt ring=3, flags=FLAG_IF
        int     TASK
1:      caught  NOTHING, eip=1b, ring=3, set=FLAG_IF, clear=FLAG_NT
        check_busy TSS_BUSY, 0

        .macro exception_calls_task vector
        mov     word ptr [idt + 8 * \vector + 2], OTHER
        mov     byte ptr [idt + 8 * \vector + 5], PRESENT + TASK_GATE
        .endm
        .macro exception_calls_us vector
        mov     word ptr [idt + 8 * \vector + 2], KERNEL_CODE
        mov     byte ptr [idt + 8 * \vector + 5], PRESENT + INTERRUPT_GATE_32
        .endm

        experiment "An exception's error code is pushed on the stack of its task"
        prepare other_ends
        exception_calls_task NP
        mov     ecx, ABSENT_DATA
        attempt
1:      mov     ds, ecx
        caught  UD, eip=other_ends, from=other_stack_top-4, set=FLAG_NT
        exception_calls_us NP
        check   "error code", [other_stack_top-4], ABSENT_DATA
        check   "saved EIP", [tss+TSS_EIP], "offset 1b"

        experiment "An exception without an error code pushes nothing"
        prepare other_ends
        exception_calls_task BR
        mov     ecx, -1
        attempt
1:      bound   ecx, [zero_to_one]
        caught  UD, eip=other_ends, from=other_stack_top, set=FLAG_NT
        exception_calls_us BR
        check   "saved EIP", [tss+TSS_EIP], "offset 1b"

        experiment "The task of an exception goes back to the instruction that raised it"
        prepare other_corrects
        exception_calls_task BR
        mov     ecx, -1
        attempt
1:      bound   ecx, [zero_to_one]
2:      caught  NOTHING, eip=2b
        exception_calls_us BR
        check   "ECX", [seen_ecx], 1
        jmp     1f
other_corrects:
        mov     dword ptr [tss + TSS_ECX], 1
        iretd
1:

        experiment "A 16-bit task gets its error code as a word"
        prepare other_16_ends
        mov     word ptr [idt + 8 * NP + 2], OTHER_16
        mov     byte ptr [idt + 8 * NP + 5], PRESENT + TASK_GATE
        mov     ecx, ABSENT_DATA
        attempt
        mov     ds, ecx
        trapped UD
        exception_calls_us NP
        check   "stack", [seen_esp], "offset other_stack_top - 2 - 12"
        check_word "error code", [other_stack_top-2], ABSENT_DATA

        experiment "A double fault's task has a stack when nobody else has"
        call    paging_on
        prepare other_ends
        mov     dword ptr [other + TSS_CR3], offset page_directory
        exception_calls_task DF
        attempt
        mov     esp, 0x00800000         # there is no page
1:      push    eax
        caught  UD, eip=other_ends, from=other_stack_top-4, set=FLAG_NT
        exception_calls_us DF
        call    paging_off
        check   "error code", [other_stack_top-4], 0
        check   "saved EIP", [tss+TSS_EIP], "offset 1b"
        check   "saved ESP", [tss+TSS_ESP], 0x00800000
        check   "CR2", [seen_cr2], 0x007FFFFC

# ---- what is refused, in the old task (table 7-1, the first checks) -------------------------------------------------

        .macro refused text, vector, error, selector, ring=0
        experiment "\text"
        prepare other_ends
        attempt ring=\ring
1:      call_far \selector
        caught  \vector, error=\error, eip=1b, ring=\ring
        attempt ring=\ring
1:      jump_far \selector
        caught  \vector, error=\error, eip=1b, ring=\ring
        check_tr KERNEL_TSS
        check_busy TSS_BUSY, 0
        .endm

        .macro refused_interrupt text, vector, error, number, ring=0
        experiment "\text"
        prepare other_ends
        attempt ring=\ring
1:      int     \number
        caught  \vector, error=\error, eip=1b, ring=\ring
        check_tr KERNEL_TSS
        check_busy TSS_BUSY, 0
        .endm

        refused "Level 3 may not use a TSS of DPL 0", GP, OTHER, OTHER+3, 3
        refused "Nor a selector of RPL 3 at level 0", GP, OTHER, OTHER+3
        refused "Level 3 may not use a task gate of DPL 0", GP, GATE_KERNEL_ONLY, GATE_KERNEL_ONLY+3, 3
        refused "A task that is busy cannot begin: #GP with its TSS", GP, KERNEL_TSS, KERNEL_TSS
        refused "Nor through a task gate", GP, KERNEL_TSS, GATE_TO_SELF
        refused "A TSS must be present: #NP with the TSS", NP, OTHER_ABSENT, OTHER_ABSENT
        refused "Behind a task gate, too", NP, OTHER_ABSENT, GATE_TO_ABSENT
        refused "A task gate must be present: #NP with the gate", NP, GATE_ABSENT, GATE_ABSENT
        refused "A task gate must not lead to a null TSS", GP, 0, GATE_TO_NULL
        refused "A task gate must not lead to the LDT", GP, IN_LDT, GATE_TO_LDT
        refused "A task gate must not lead beyond the GDT", GP, BEYOND, GATE_TO_BEYOND
        refused "A task gate must lead to a TSS", GP, KERNEL_DATA, GATE_TO_DATA
        refused "A TSS must have 68h bytes: #TS with the TSS", TS, OTHER_SHORT, OTHER_SHORT
        refused "A 16-bit TSS must have 2Ch bytes: #TS with the TSS", TS, OTHER_16_SHORT, OTHER_16_SHORT

        refused_interrupt "INT n at level 3 needs a task gate of DPL 3", GP, TASK_KERNEL_ONLY*8+IDT, TASK_KERNEL_ONLY, 3
        refused_interrupt "INT n needs a task gate that is present", NP, TASK_ABSENT*8+IDT, TASK_ABSENT
        refused_interrupt "INT n does not begin a task that is busy", GP, KERNEL_TSS, TASK_TO_SELF
        refused_interrupt "INT n needs a TSS that is present", NP, OTHER_ABSENT, TASK_TO_ABSENT
        refused_interrupt "INT n through a task gate needs a TSS", GP, KERNEL_DATA, TASK_TO_DATA
        refused_interrupt "INT n through a task gate needs a TSS in the GDT", GP, BEYOND, TASK_TO_BEYOND

        .macro no_way_back text, error, link
        experiment "\text"
        prepare other_ends
        mov     word ptr [tss + TSS_LINK], \link
        attempt flags=FLAG_NT
1:      iretd
        caught  TS, error=\error, eip=1b, set=FLAG_NT
        check_tr KERNEL_TSS
        check_busy TSS_BUSY, 0
        .endm

        no_way_back "IRET with NT set needs a link: #TS(0) without one", 0, 0
        no_way_back "The link must lead into the GDT: #TS with it", BEYOND, BEYOND
        no_way_back "The link must not lead to the LDT", 0x0C, 0x0C
        no_way_back "The link must lead to a TSS", KERNEL_DATA, KERNEL_DATA
        no_way_back "The link must lead to a task that is busy", OTHER, OTHER

        experiment "A link to a task that is not present is #NP with it"
        prepare other_ends
        mov     byte ptr [gdt + OTHER_ABSENT + 5], TSS_32 + TSS_BUSY
        mov     word ptr [tss + TSS_LINK], OTHER_ABSENT
        attempt flags=FLAG_NT
1:      iretd
        caught  NP, error=OTHER_ABSENT, eip=1b, set=FLAG_NT
        mov     byte ptr [gdt + OTHER_ABSENT + 5], TSS_32

# ---- what is refused, in the new task (table 7-1, the checks behind the switch) -------------------------------------

        # The switch has been made: the exception is one of the new task's, before its first instruction. But that has
        # no good registers yet, so the handler has to be a task of its own (6.15, interrupt 10): `doctor`, which finds
        # the error code on its stack and the patient's state in the TSS that its link leads to.
        .macro bad_register text, vector, error, register, selector, level=3
        experiment "\text"
        prepare other_ends
        .if \level == 3
        to_level_3
        .endif
        mov     dword ptr [other + \register], \selector
        mov     word ptr [idt + 8 * \vector + 2], DOCTOR
        mov     byte ptr [idt + 8 * \vector + 5], PRESENT + TASK_GATE
        attempt
        call_far OTHER
1:      caught  UD, eip=doctor_ends, from=doctor_stack_top-4, set=FLAG_NT
        exception_calls_us \vector
        check   "error code", [doctor_stack_top-4], \error
        check_word "link of the doctor", [doctor+TSS_LINK], OTHER
        check_word "link of the other", [other+TSS_LINK], KERNEL_TSS
        check   "the other's saved EIP", [other+TSS_EIP], "offset other_ends"
        check   "the other's saved ESP", [other+TSS_ESP], "offset other_stack_top"
        check   "the other's saved EDI", [other+TSS_EDI], 0x88880007
        mov     ecx, [other + TSS_EFLAGS]
        check_bits "the other's saved NT", ecx, FLAG_NT, FLAG_NT
        check   "our saved EIP", [tss+TSS_EIP], "offset 1b"
        check_tr DOCTOR
        check_busy TSS_BUSY, TSS_BUSY
        .endm

        bad_register "A new task's SS must not be null: #TS(0) in the new task", TS, 0, TSS_SS, 0
        bad_register "A new task's SS must be in the table: #TS with it", TS, BEYOND, TSS_SS, BEYOND+3
        bad_register "A new task's SS must be of its level", TS, KERNEL_DATA, TSS_SS, KERNEL_DATA+3
        bad_register "A new task's SS must have its level's RPL", TS, USER_DATA_0, TSS_SS, USER_DATA_0
        bad_register "A new task's SS must be writable", TS, USER_CODE_0, TSS_SS, USER_CODE
        bad_register "A new task's SS must be present: #SS with it", STACK_FAULT, ABSENT_DATA_3, TSS_SS, ABSENT_DATA_3+3
        bad_register "A new task's DS must be in the table: #TS with it", TS, BEYOND, TSS_DS, BEYOND+3
        bad_register "A new task's ES must not be above its level", TS, KERNEL_DATA, TSS_ES, KERNEL_DATA
        bad_register "A new task's FS must not be a system segment", TS, OTHER, TSS_FS, OTHER+3
        bad_register "A new task's GS must be present: #NP with it", NP, ABSENT_DATA_3, TSS_GS, ABSENT_DATA_3+3
        bad_register "A new task's LDT must be an LDT: #TS with it", TS, KERNEL_DATA, TSS_LDT, KERNEL_DATA
        bad_register "A new task's LDT must be in the GDT", TS, 0x0C, TSS_LDT, 0x0C
        bad_register "A new task's LDT must be present: #TS with it", TS, LOCAL_ABSENT, TSS_LDT, LOCAL_ABSENT

        bad_register "A new task's CS must not be null: #TS(0)", TS, 0, TSS_CS, 0, 0
        bad_register "A new task's CS must be in the table: #TS with it", TS, BEYOND, TSS_CS, BEYOND, 0
        bad_register "A new task's CS must be code", TS, KERNEL_DATA, TSS_CS, KERNEL_DATA, 0
        bad_register "A new task's CS must have the RPL of its DPL", TS, USER_CODE_0, TSS_CS, USER_CODE_0, 0
        bad_register "A new task's CS must be present: #NP with it", NP, ABSENT_CODE, TSS_CS, ABSENT_CODE, 0
        bad_register "A new task's EIP must lie in its CS: #GP(0) in the new task", GP, 0, TSS_CS, SHORT_CODE, 0

# ---- 16-bit tasks ---------------------------------------------------------------------------------------------------

        experiment "A 16-bit TSS has words, and no FS and GS: they become null"
        prepare other_16_ends
        mov     word ptr [other_16 + TSS16_FLAGS], 2 + FLAG_DF + FLAG_CF
        attempt
        jump_far OTHER_16
1:      trapped UD
        check   "EIP", [seen_frame], "offset other_16_ends + 3"
        check_bits "EFLAGS", [seen_frame+8], FLAG_DF+FLAG_CF+FLAG_NT, FLAG_DF+FLAG_CF
        check_bits "AX", [seen_eax], 0xFFFF, 0x2000
        check_bits "CX", [seen_ecx], 0xFFFF, 0x2101
        check_bits "DX", [seen_edx], 0xFFFF, 0x2202
        check_bits "BX", [seen_ebx], 0xFFFF, 0x2303
        check_bits "BP", [seen_ebp], 0xFFFF, 0x2505
        check_bits "SI", [seen_esi], 0xFFFF, 0x2606
        check_bits "DI", [seen_edi], 0xFFFF, 0x2707
        check   "DS", [seen_ds], KERNEL_DATA
        check   "FS", [seen_fs], 0
        check   "GS", [seen_gs], 0
        check_tr OTHER_16
        check_busy 0, TSS_BUSY, OTHER_16
        check   "saved EIP", [tss+TSS_EIP], "offset 1b"

        experiment "A 16-bit task saves words, and goes back to a 32-bit one"
        prepare other_16_returns
        our_registers
        attempt flags=FLAG_DF+FLAG_CF
        mov     eax, 0x99990000
        call_far OTHER_16
1:      caught  NOTHING, eip=1b, set=FLAG_DF+FLAG_CF, clear=FLAG_NT
        check   "EAX", [seen_eax], 0x99990000
        check   "EDI", [seen_edi], 0x99990007
        check   "FS", [seen_fs], KERNEL_DATA
        check_busy TSS_BUSY, 0, OTHER_16
        check_word "link", [other_16+TSS_LINK], KERNEL_TSS
        check_word "saved IP", [other_16+TSS16_IP], "offset other_16_returned"
        check_word "saved FLAGS", [other_16+TSS16_FLAGS], 2
        check_word "saved AX", [other_16+TSS16_AX], 0x5555
        check_word "saved SP", [other_16+TSS16_SP], "offset other_stack_top"
        check_word "saved DI", [other_16+TSS16_DI], 0x2707
        check_word "saved CS", [other_16+TSS16_CS], KERNEL_CODE
        check_word "saved DS", [other_16+TSS16_DS], KERNEL_DATA
        check_word "the LDT, which is not saved", [other_16+TSS16_LDT], 0
        jmp     1f
other_16_returns:
        mov     eax, 0x5555
        iretd
other_16_returned:
1:

# ---- LDT, CR3, debugging --------------------------------------------------------------------------------------------

        experiment "A task brings its LDT along, and its segments may come from there"
        prepare other_ends
        mov     word ptr [other + TSS_LDT], LOCAL
        mov     word ptr [other + TSS_ES], IN_LDT
        attempt
        call_far OTHER
        caught  UD, eip=other_ends, from=other_stack_top
        check   "ES", [seen_es], IN_LDT
        sldt    ecx
        check   "LDTR", ecx, LOCAL

        experiment "IRET brings ours back, and our TSS says which it is, for it is never saved"
        prepare other_returns
        mov     word ptr [other + TSS_LDT], LOCAL
        mov     word ptr [tss + TSS_LDT], LOCAL
        attempt
        call_far OTHER
1:      caught  NOTHING, eip=1b
        sldt    ecx
        check   "LDTR", ecx, LOCAL
        check_word "LDT in the TSS", [tss+TSS_LDT], LOCAL
        mov     word ptr [tss + TSS_LDT], 0

        experiment "With paging on, a task brings its page tables along"
        call    paging_on
        prepare other_reads_page
        mov     esi, offset page_table          # the same pages, but for one
        mov     edi, offset other_table
        mov     ecx, 1024
        rep movsd
        mov     dword ptr [other_directory], offset other_table + PAGE_ALL
        mov     dword ptr [other_table + 4 * 0x200], offset other_page + PAGE_ALL
        mov     dword ptr [page_table + 4 * 0x200], offset other_directory + PAGE_ALL
        mov     dword ptr [other_page], 0x600DF00D
        mov     dword ptr [other + TSS_CR3], offset other_directory
        mov     dword ptr [tss + TSS_CR3], offset page_directory
        attempt
        call_far OTHER
        mov     ebx, ds:[0x200000]              # here this page is the other's directory
        mov     edx, cr3
1:      caught  NOTHING, eip=1b
        call    paging_off
        check   "read in the other task", [other+TSS_ECX], 0x600DF00D
        check   "CR3 in the other task", [other+TSS_EAX+8], "offset other_directory"
        check   "read in ours again", [seen_ebx], "offset other_table + PAGE_ALL + 0x20"
        check   "CR3 in ours again", [seen_edx], "offset page_directory"
        jmp     1f
other_reads_page:
        mov     ecx, ds:[0x200000]
        mov     edx, cr3
        iretd
.section .pages
other_page: .skip 4096
.section .text
1:

        experiment "The T bit stops a task with #DB before its first instruction, and DR6 says BT"
        mov     eax, DR6_NONE
        mov     dr6, eax
        prepare other_ends
        mov     byte ptr [other + TSS_TRAP], 1
        attempt
        call_far OTHER
        caught  DB, eip=other_ends, from=other_stack_top, set=FLAG_NT
        mov     ecx, dr6
        check_bits "DR6.BT", ecx, DR6_BT, DR6_BT

        experiment "A task switch takes away the local breakpoints"
        prepare other_ends
        mov     eax, 0xDEAD0000
        mov     dr0, eax
        mov     dr1, eax
        mov     eax, 0x0D               # L0, L1 and G1
        mov     dr7, eax
        attempt
        jump_far OTHER
        caught  UD, eip=other_ends, from=other_stack_top
        mov     ecx, dr7
        xor     eax, eax
        mov     dr7, eax
        check_bits "enable bits of DR7", ecx, 0xFF, 0x08

        xor     eax, eax                # the last one: home again
        prepare other_ends
        jmp     finish

.section .rodata
.balign 4
zero_to_one:
        .long   0, 1
