# gates.s: interrupt, trap and call gates; conforming code; stacks from the TSS; returns outward.
#
# Mirrors: Intel SDM volume 3A, sections 5.8 "Privilege level checking when transferring program control between code
# segments" and 6.12 "Exception and interrupt handling"; figure 6-6 "Error code".

.include "base.inc"

# ---- the segments and gates of the experiments ----------------------------------------------------------------------

segment CONFORMING, 0b10011110                  # level 0, but anybody may run it, at his own level
segment CONFORMING_3, 0b11111110
segment ABSENT_CODE, 0b00011010
segment ABSENT_DATA, 0b00010010
segment SHORT_CODE, 0b10011010, 0b0100, 0, 0xFF # nothing of ours is below 100h
segment UP_TO_EFFF, 0b10011010, 0b0100, 0, 0xEFFF
segment READ_ONLY, 0b10110000                   # level 1
segment CODE_1_0, 0b10111010                    # level 1: its stack may be bad and an exception still find a good one
segment DATA_1_0, 0b10110010
segment ABSENT_1, 0b00110010
segment ABSENT_3, 0b01110010
segment TINY_1, 0b10110010, 0b0100, 0, 15
segment TSS_WITHOUT_LEVEL_1, PRESENT | TSS_32, 0, tss, 11
.equ CODE_1, CODE_1_0 + 1
.equ DATA_1, DATA_1_0 + 1
.equ BEYOND, 0xFF8                              # the GDT is not that long

.section .bss
        .skip   512
ring1_stack_top:
.section .text

vector OPEN, INTERRUPT_GATE_32, dpl=3
vector OPEN_TRAP, TRAP_GATE_32, dpl=3
vector KERNEL_ONLY, INTERRUPT_GATE_32
vector ABSENT, INTERRUPT_GATE_32, dpl=3, present=0
vector ABSENT_KERNEL_ONLY, INTERRUPT_GATE_32, present=0
vector NO_INTERRUPT_GATE, CALL_GATE_32
vector TO_NULL, INTERRUPT_GATE_32, selector=0
vector TO_DATA, INTERRUPT_GATE_32, selector=KERNEL_DATA
vector TO_BEYOND, INTERRUPT_GATE_32, selector=BEYOND
vector TO_USER, INTERRUPT_GATE_32, selector=USER_CODE
vector TO_ABSENT, INTERRUPT_GATE_32, selector=ABSENT_CODE
vector TO_SHORT, INTERRUPT_GATE_32, selector=SHORT_CODE
vector TO_CONFORMING, INTERRUPT_GATE_32, selector=CONFORMING, to=in_conforming, dpl=3
vector TO_RING_1, TRAP_GATE_32, selector=CODE_1_0, to=in_ring1, dpl=3
vector WORDS, INTERRUPT_GATE_16, dpl=3
vector WORDS_TRAP, TRAP_GATE_16, dpl=3

# Handlers that go no further: what they were given is on the stack above the frame of their #UD.
in_conforming:
        ud2
in_ring1:
        ud2
behind_gate:
        ud2

call_gate GATE, CALL_GATE_32, KERNEL_CODE, behind_gate, dpl=3
call_gate GATE_2, CALL_GATE_32, KERNEL_CODE, behind_gate, dpl=3, count=2
call_gate GATE_WORDS, CALL_GATE_16, KERNEL_CODE, behind_gate, dpl=3, count=2
call_gate GATE_KERNEL_ONLY, CALL_GATE_32, KERNEL_CODE, behind_gate
call_gate GATE_ABSENT, CALL_GATE_32, KERNEL_CODE, behind_gate, dpl=3, present=0
call_gate GATE_NEITHER, CALL_GATE_32, KERNEL_CODE, behind_gate, present=0
call_gate GATE_TO_NULL, CALL_GATE_32, 0, behind_gate, dpl=3
call_gate GATE_TO_DATA, CALL_GATE_32, KERNEL_DATA, behind_gate, dpl=3
call_gate GATE_TO_BEYOND, CALL_GATE_32, BEYOND, behind_gate, dpl=3
call_gate GATE_TO_USER, CALL_GATE_32, USER_CODE, behind_gate
call_gate GATE_TO_ABSENT, CALL_GATE_32, ABSENT_CODE, behind_gate, dpl=3
call_gate GATE_TO_SHORT, CALL_GATE_32, SHORT_CODE, behind_gate, dpl=3
call_gate GATE_TO_CONFORMING, CALL_GATE_32, CONFORMING, in_conforming, dpl=3, count=2
call_gate GATE_TO_RING_1, CALL_GATE_32, CODE_1_0, in_ring1, dpl=3, count=1
call_gate NO_CALL_GATE, INTERRUPT_GATE_32, KERNEL_CODE, behind_gate, dpl=3

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

.section .text
main:

# ---- interrupt and trap gates (6.12.1) ------------------------------------------------------------------------------

        experiment "An interrupt gate turns interrupts off, and the frame tells that they were on"
        attempt ring=3, flags=FLAG_IF
        int     OPEN
1:      caught  OPEN, eip=1b, ring=3, set=FLAG_IF
        check_bits "IF in the handler", [seen_eflags], FLAG_IF, 0
        check   "CS in the handler", [seen_cs], KERNEL_CODE
        check   "SS in the handler", [seen_ss], KERNEL_DATA
        check   "DS in the handler", [seen_ds], USER_DATA

        experiment "A trap gate leaves interrupts on"
        attempt ring=3, flags=FLAG_IF
        int     OPEN_TRAP
1:      caught  OPEN_TRAP, eip=1b, ring=3, set=FLAG_IF
        check_bits "IF in the handler", [seen_eflags], FLAG_IF, FLAG_IF

        experiment "Both turn NT off, and leave DF, IOPL and AC alone"
        attempt flags=FLAG_NT|FLAG_DF|FLAG_IOPL|FLAG_AC
        int     OPEN_TRAP
1:      caught  OPEN_TRAP, eip=1b, set=FLAG_NT|FLAG_DF|FLAG_IOPL|FLAG_AC
        mov     eax, FLAG_NT | FLAG_DF | FLAG_IOPL | FLAG_AC
        check_bits "EFLAGS in the handler", [seen_eflags], eax, FLAG_DF|FLAG_IOPL|FLAG_AC

        experiment "At level 0 an interrupt stays on its stack"
        attempt
        int     KERNEL_ONLY
1:      caught  KERNEL_ONLY, eip=1b

        experiment "INT n at level 3 needs a gate of DPL 3"
        attempt ring=3
1:      int     KERNEL_ONLY
        caught  GP, error=KERNEL_ONLY*8+IDT, eip=1b, ring=3

        experiment "So do INT3 and INTO"
        attempt ring=3
1:      int3
        caught  GP, error=BREAKPOINT*8+IDT, eip=1b, ring=3
        attempt ring=3
        mov     al, 0x7F
        inc     al
1:      into
        caught  GP, error=OF*8+IDT, eip=1b, ring=3

        experiment "A gate that is not present is #NP, with the gate in the error code"
        attempt ring=3
1:      int     ABSENT
        caught  NP, error=ABSENT*8+IDT, eip=1b, ring=3

        experiment "That a gate may not be used is found out before that it is not present"
        attempt ring=3
1:      int     ABSENT_KERNEL_ONLY
        caught  GP, error=ABSENT_KERNEL_ONLY*8+IDT, eip=1b, ring=3

        experiment "The IDT has an end"
        attempt
1:      int     0xF0
        caught  GP, error=0xF0*8+IDT, eip=1b

        experiment "A call gate in the IDT is no gate"
        attempt
1:      int     NO_INTERRUPT_GATE
        caught  GP, error=NO_INTERRUPT_GATE*8+IDT, eip=1b

        experiment "A handler's segment must not be null"
        attempt
1:      int     TO_NULL
        caught  GP, error=0, eip=1b

        experiment "A handler's segment must be in the table"
        attempt
1:      int     TO_BEYOND
        caught  GP, error=BEYOND, eip=1b

        experiment "A handler's segment must be code"
        attempt
1:      int     TO_DATA
        caught  GP, error=KERNEL_DATA, eip=1b

        experiment "A handler's segment must not be less privileged"
        attempt
1:      int     TO_USER
        caught  GP, error=USER_CODE_0, eip=1b

        experiment "A handler's segment must be present"
        attempt
1:      int     TO_ABSENT
        caught  NP, error=ABSENT_CODE, eip=1b

        experiment "A handler's segment must reach to the handler"
        attempt
1:      int     TO_SHORT
        caught  GP, error=0, eip=1b

        experiment "An exception that finds no gate says EXT: the program did not ask for it"
        mov     byte ptr [idt + 8 * BR + 5], INTERRUPT_GATE_32
        attempt
        mov     eax, -1
1:      bound   eax, [zero_to_one]
        caught  NP, error=BR*8+IDT+EXT, eip=1b
        mov     byte ptr [idt + 8 * BR + 5], PRESENT | INTERRUPT_GATE_32

        experiment "INT3 and INTO that find no gate do not: the program asked"
        mov     byte ptr [idt + 8 * BREAKPOINT + 5], INTERRUPT_GATE_32
        attempt
1:      int3
        caught  NP, error=BREAKPOINT*8+IDT, eip=1b
        mov     byte ptr [idt + 8 * BREAKPOINT + 5], PRESENT | INTERRUPT_GATE_32

        experiment "An exception that finds no segment says EXT"
        mov     word ptr [idt + 8 * BR + 2], KERNEL_DATA
        attempt
        mov     eax, -1
1:      bound   eax, [zero_to_one]
        caught  GP, error=KERNEL_DATA+EXT, eip=1b
        mov     word ptr [idt + 8 * BR + 2], KERNEL_CODE

        experiment "EXT stands alone when the selector is null"
        mov     word ptr [idt + 8 * BR + 2], 0
        attempt
        mov     eax, -1
1:      bound   eax, [zero_to_one]
        caught  GP, error=EXT, eip=1b
        mov     word ptr [idt + 8 * BR + 2], KERNEL_CODE

        experiment "EXT stands alone when the handler lies beyond its segment"
        mov     word ptr [idt + 8 * BR + 2], SHORT_CODE
        attempt
        mov     eax, -1
1:      bound   eax, [zero_to_one]
        caught  GP, error=EXT, eip=1b
        mov     word ptr [idt + 8 * BR + 2], KERNEL_CODE

        experiment "A handler in conforming code runs at the level it was called from, on its stack"
        attempt ring=3
        int     TO_CONFORMING
        caught  UD, eip=in_conforming, ring=3, cs=CONFORMING+3, user_esp=user_stack_top-12

# ---- 16-bit gates ---------------------------------------------------------------------------------------------------

        experiment "A 16-bit gate pushes words: FLAGS, CS, IP"
        attempt
        int     WORDS
1:      trapped WORDS
        check   "CS:IP", [seen_frame], "offset 1b + (KERNEL_CODE << 16)"
        check_bits "FLAGS", [seen_frame+4], 0xFF2A, 2
        mov     eax, [resume_esp]
        sub     eax, [seen_esp]
        check   "pushed", eax, 6

        experiment "From level 3 it pushes SP and SS too, on a stack that is 32 bits wide all the same"
        attempt ring=3, flags=FLAG_IF
        int     WORDS
1:      trapped WORDS
        check   "CS:IP", [seen_frame], "offset 1b + (USER_CODE << 16)"
        check_bits "FLAGS", [seen_frame+4], 0xFF2A, FLAG_IF+2
        check   "SS:SP", [seen_frame+6], "offset user_stack_top + (USER_DATA << 16)"
        check   "stack", [seen_esp], "offset ring0_stack_top - 10"
        check_bits "IF in the handler", [seen_eflags], FLAG_IF, 0

        experiment "A 16-bit trap gate leaves interrupts on"
        attempt ring=3, flags=FLAG_IF
        int     WORDS_TRAP
        trapped WORDS_TRAP
        check_bits "IF in the handler", [seen_eflags], FLAG_IF, FLAG_IF

        experiment "Through a 16-bit gate the error code is a word"
        mov     byte ptr [idt + 8 * GP + 5], PRESENT | INTERRUPT_GATE_16
        attempt
1:      int     0xF0
        trapped GP
        mov     byte ptr [idt + 8 * GP + 5], PRESENT | INTERRUPT_GATE_32
        check_bits "error code", [seen_frame], 0xFFFF, 0xF0*8+IDT
        check_bits "IP", [seen_frame+2], 0xFFFF, "offset 1b"
        mov     eax, [resume_esp]
        sub     eax, [seen_esp]
        check   "pushed", eax, 8

# ---- stacks of the inner levels -------------------------------------------------------------------------------------

        # Level 1 gets its stack from the TSS; whatever is wrong with that one, the exception is handled at level 0.
        .macro stack_of_level_1 selector, pointer=ring1_stack_top
        mov     dword ptr [tss_ss1], \selector
        mov     dword ptr [tss_esp1], offset \pointer
        .endm

        experiment "INT takes the stack of the handler's level from the TSS"
        stack_of_level_1 DATA_1
        attempt ring=3, flags=FLAG_IF
        int     TO_RING_1
1:      caught  UD, eip=in_ring1, ring=3, cs=CODE_1, user_esp=ring1_stack_top-20, ss=DATA_1, set=FLAG_IF
        check   "EIP for level 1", [ring1_stack_top-20], "offset 1b"
        check   "CS for level 1", [ring1_stack_top-16], USER_CODE
        check   "ESP for level 1", [ring1_stack_top-8], "offset user_stack_top"
        check   "SS for level 1", [ring1_stack_top-4], USER_DATA

        # What each of these is for an INT and for a CALL through a gate.
        .macro bad_stack text, vector, error, selector, pointer=ring1_stack_top
        experiment "\text"
        stack_of_level_1 \selector, \pointer
        attempt ring=3
1:      int     TO_RING_1
        caught  \vector, error=\error, eip=1b, ring=3
        attempt ring=3
        push    0x1111
1:      call_far GATE_TO_RING_1
        caught  \vector, error=\error, eip=1b, ring=3, user_esp=user_stack_top-4
        .endm

        bad_stack "A stack segment in the TSS must not be null: #TS(0)", TS, 0, 0
        bad_stack "A stack segment in the TSS must not be null, nor null with an RPL: #TS(0) too", TS, 0, 1
        bad_stack "A stack segment in the TSS: its RPL must be the level: #TS with the selector", TS, DATA_1_0, DATA_1_0
        bad_stack "A stack segment in the TSS: its DPL must be the level", TS, KERNEL_DATA, KERNEL_DATA+1
        bad_stack "A stack segment in the TSS must be data", TS, CODE_1_0, CODE_1
        bad_stack "A stack segment in the TSS must be writable", TS, READ_ONLY, READ_ONLY+1
        bad_stack "A stack segment in the TSS must be in the table", TS, BEYOND, BEYOND+1
        bad_stack "A stack segment in the TSS must be present: #SS with the selector", STACK_FAULT, ABSENT_1, ABSENT_1+1
        bad_stack "A stack segment in the TSS must have room: #SS with it", STACK_FAULT, TINY_1, TINY_1+1, 8

        experiment "An exception that finds no stack says EXT"
        mov     word ptr [idt + 8 * BR + 2], CODE_1_0
        stack_of_level_1 DATA_1_0
        attempt ring=3
        mov     eax, -1
1:      bound   eax, [zero_to_one]
        caught  TS, error=DATA_1_0+EXT, eip=1b, ring=3
        mov     word ptr [idt + 8 * BR + 2], KERNEL_CODE

        experiment "The TSS must have a stack for the level: #TS with the TSS"
        mov     eax, TSS_WITHOUT_LEVEL_1
        ltr     ax
        attempt ring=3
1:      int     TO_RING_1
        caught  TS, error=TSS_WITHOUT_LEVEL_1, eip=1b, ring=3
        attempt ring=3
1:      call_far GATE_TO_RING_1
        caught  TS, error=TSS_WITHOUT_LEVEL_1, eip=1b, ring=3
        mov     byte ptr [gdt + KERNEL_TSS + 5], PRESENT | TSS_32       # no longer busy
        mov     eax, KERNEL_TSS
        ltr     ax

# ---- call gates (5.8.3 to 5.8.5) ------------------------------------------------------------------------------------

        experiment "A call gate leads to level 0, whatever offset the caller gives"
        attempt ring=3, flags=FLAG_IF
        call_far GATE, 0xDEADBEEF
1:      caught  UD, eip=behind_gate, from=ring0_stack_top-16, set=FLAG_IF
        check   "return EIP", [ring0_stack_top-16], "offset 1b"
        check   "return CS", [ring0_stack_top-12], USER_CODE
        check   "return ESP", [ring0_stack_top-8], "offset user_stack_top"
        check   "return SS", [ring0_stack_top-4], USER_DATA

        experiment "It copies parameters from the caller's stack, in their order"
        attempt ring=3
        push    0x11111111
        push    0x22222222
        call_far GATE_2
1:      caught  UD, eip=behind_gate, from=ring0_stack_top-24
        check   "return EIP", [ring0_stack_top-24], "offset 1b"
        check   "return CS", [ring0_stack_top-20], USER_CODE
        check   "last parameter", [ring0_stack_top-16], 0x22222222
        check   "first parameter", [ring0_stack_top-12], 0x11111111
        check   "return ESP", [ring0_stack_top-8], "offset user_stack_top - 8"
        check   "return SS", [ring0_stack_top-4], USER_DATA

        experiment "A 16-bit call gate pushes and copies words"
        attempt ring=3
        push    0x22221111
        call_far GATE_WORDS
1:      caught  UD, eip=behind_gate, from=ring0_stack_top-12
        check   "return CS:IP", [ring0_stack_top-12], "offset 1b + (USER_CODE << 16)"
        check   "parameters", [ring0_stack_top-8], 0x22221111
        check   "return SS:SP", [ring0_stack_top-4], "offset user_stack_top - 4 + (USER_DATA << 16)"

        experiment "At the same level a call gate changes no stack and copies nothing"
        attempt
        call_far GATE_2
1:      trapped UD
        check   "EIP", [seen_frame], "offset behind_gate"
        check   "return EIP", [seen_frame+12], "offset 1b"
        check   "return CS", [seen_frame+16], KERNEL_CODE
        mov     eax, [resume_esp]
        sub     eax, [seen_esp]
        check   "pushed", eax, 8+12

        experiment "A call gate to conforming code changes neither level nor stack"
        attempt ring=3
        call_far GATE_TO_CONFORMING
1:      caught  UD, eip=in_conforming, ring=3, cs=CONFORMING+3, user_esp=user_stack_top-8
        check   "return EIP", [user_stack_top-8], "offset 1b"
        check   "return CS", [user_stack_top-4], USER_CODE

        experiment "A call gate to level 1 takes the stack of level 1"
        stack_of_level_1 DATA_1
        attempt ring=3
        push    0x1111
        call_far GATE_TO_RING_1
1:      caught  UD, eip=in_ring1, ring=3, cs=CODE_1, user_esp=ring1_stack_top-20, ss=DATA_1
        check   "return EIP", [ring1_stack_top-20], "offset 1b"
        check   "parameter", [ring1_stack_top-12], 0x1111

        .macro bad_gate text, vector, error, selector, ring=3
        experiment "\text"
        attempt ring=\ring
1:      call_far \selector
        caught  \vector, error=\error, eip=1b, ring=\ring
        attempt ring=\ring
1:      jump_far \selector
        caught  \vector, error=\error, eip=1b, ring=\ring
        .endm

        bad_gate "A call gate's DPL must not be below the caller's level", GP, GATE_KERNEL_ONLY, GATE_KERNEL_ONLY
        bad_gate "A call gate's DPL must not be below the RPL", GP, GATE_KERNEL_ONLY, GATE_KERNEL_ONLY+3, 0
        bad_gate "A call gate must be present: #NP with the gate", NP, GATE_ABSENT, GATE_ABSENT
        bad_gate "A call gate's DPL is looked at before it is found not to be present", GP, GATE_NEITHER, GATE_NEITHER
        bad_gate "The code behind a gate must not be null", GP, 0, GATE_TO_NULL
        bad_gate "The code behind a gate must be in the table", GP, BEYOND, GATE_TO_BEYOND
        bad_gate "The code behind a gate must be code", GP, KERNEL_DATA, GATE_TO_DATA
        bad_gate "The code behind a gate must not be less privileged", GP, USER_CODE_0, GATE_TO_USER, 0
        bad_gate "The code behind a gate must be present: #NP with the code", NP, ABSENT_CODE, GATE_TO_ABSENT, 0
        bad_gate "The code behind a gate must reach to the gate's offset", GP, 0, GATE_TO_SHORT, 0
        bad_gate "An interrupt gate in the GDT is no call gate", GP, NO_CALL_GATE, NO_CALL_GATE, 0

        experiment "JMP through a gate changes no level: #GP with the code"
        attempt ring=3
1:      jump_far GATE
        caught  GP, error=KERNEL_CODE, eip=1b, ring=3

        experiment "JMP through a gate works at the same level, and pushes nothing"
        attempt
        jump_far GATE_2, 0xDEADBEEF
        caught  UD, eip=behind_gate

        experiment "JMP through a gate to conforming code works from level 3"
        attempt ring=3
        jump_far GATE_TO_CONFORMING
        caught  UD, eip=in_conforming, ring=3, cs=CONFORMING+3

# ---- far JMP and CALL without a gate (5.8.1) ------------------------------------------------------------------------

        experiment "Conforming code may be called from level 3, and runs there"
        attempt ring=3
        call_far CONFORMING, in_conforming
1:      caught  UD, eip=in_conforming, ring=3, cs=CONFORMING+3, user_esp=user_stack_top-8
        check   "return EIP", [user_stack_top-8], "offset 1b"
        check   "return CS", [user_stack_top-4], USER_CODE

        experiment "CS gets the level for its RPL, not what the selector said"
        attempt
        jump_far CONFORMING+3, in_conforming
        caught  UD, eip=in_conforming, cs=CONFORMING

        bad_gate "Conforming code of level 3 is not for level 0", GP, CONFORMING_3, CONFORMING_3, 0
        bad_gate "Level 3 does not reach code of level 0", GP, KERNEL_CODE, KERNEL_CODE
        bad_gate "Level 0 does not reach code of level 3", GP, USER_CODE_0, USER_CODE, 0
        bad_gate "A far call or jump with an RPL above the level is refused", GP, KERNEL_CODE, KERNEL_CODE+1, 0
        bad_gate "A far call or jump does not go to data", GP, KERNEL_DATA, KERNEL_DATA, 0
        bad_gate "A far call or jump does not go to a null segment", GP, 0, 3, 0
        bad_gate "A far call or jump does not go beyond the table", GP, BEYOND, BEYOND, 0
        bad_gate "A far call or jump to code that is not present is #NP", NP, ABSENT_CODE, ABSENT_CODE, 0

        experiment "An offset beyond the segment is #GP(0), before anything has been pushed"
        attempt
1:      call_far SHORT_CODE, 0x100
        caught  GP, error=0, eip=1b
        attempt
1:      jump_far SHORT_CODE, 0x100
        caught  GP, error=0, eip=1b

        experiment "So is a near one, at the jump, call or return"
        .equ    beyond_it, 0xF000
        mov     word ptr [beyond_it], 0x0B0F    # UD2, for who goes there all the same
        jump_far UP_TO_EFFF, 1f
1:      attempt
1:      jmp     beyond_it
        caught  GP, error=0, eip=1b, cs=UP_TO_EFFF
        jump_far UP_TO_EFFF, 1f
1:      mov     ebx, offset beyond_it
        attempt
1:      call    ebx
        caught  GP, error=0, eip=1b, cs=UP_TO_EFFF
        jump_far UP_TO_EFFF, 1f
1:      attempt
        push    offset beyond_it
1:      ret
        trapped GP
        check   "error code", [seen_frame], 0
        check   "EIP", [seen_frame+4], "offset 1b"

# ---- RETF and IRET (5.8.6) ------------------------------------------------------------------------------------------

        # Pushes what a return to level 3 pops.
        .macro push_outward to, flags=none, cs=USER_CODE, ss=USER_DATA
        push    \ss
        push    offset user_stack_top
        .ifnc \flags,none
        push    \flags
        .endif
        push    \cs
        push    offset \to
        .endm

        # Segments of every kind: of level 0, of level 3, conforming, null.
        .macro load_all_kinds
        mov     eax, USER_DATA
        mov     es, eax
        mov     eax, CONFORMING
        mov     fs, eax
        xor     eax, eax
        mov     gs, eax
        .endm

        experiment "RETF outward takes away the data segments that level 3 may not have"
        attempt
        load_all_kinds
        push_outward 1f
        retf
1:      caught  NOTHING, eip=1b, ring=3
        check   "DS", [seen_ds], 0
        check   "ES", [seen_es], USER_DATA
        check   "FS", [seen_fs], CONFORMING
        check   "GS", [seen_gs], 0

        experiment "So does IRET"
        attempt
        load_all_kinds
        push_outward 1f, FLAG_IF
        iretd
1:      caught  NOTHING, eip=1b, ring=3, set=FLAG_IF
        check   "DS", [seen_ds], 0
        check   "ES", [seen_es], USER_DATA
        check   "FS", [seen_fs], CONFORMING
        check   "GS", [seen_gs], 0

        experiment "A segment taken away is null: its use is #GP(0)"
        attempt
        push_outward 1f
        retf
1:      mov     eax, ds:[0]
        caught  GP, error=0, eip=1b, ring=3

        experiment "RETF n releases parameters from both stacks"
        attempt
        push    USER_DATA
        push    offset user_stack_top - 8
        push    0x1111                  # parameters, as a call gate copied them
        push    0x2222
        push    USER_CODE
        push    offset 1f
        retf    8
1:      caught  NOTHING, eip=1b, ring=3

        experiment "RETF n at the same level releases them from the one stack"
        attempt
        push    0x1111
        push    0x2222
        push    KERNEL_CODE
        push    offset 1f
        retf    8
1:      caught  NOTHING, eip=1b

        .macro bad_return text, vector, error, cs=USER_CODE, ss=USER_DATA
        experiment "\text"
        attempt
        push_outward 2f, cs=\cs, ss=\ss
1:      retf
2:      trapped \vector
        check   "error code of RETF", [seen_frame], \error
        check   "EIP of RETF", [seen_frame+4], "offset 1b"
        attempt
        push_outward 2f, 2, \cs, \ss
1:      iretd
2:      trapped \vector
        check   "error code of IRET", [seen_frame], \error
        check   "EIP of IRET", [seen_frame+4], "offset 1b"
        .endm

        bad_return "A return does not go to a null segment", GP, 0, cs=0
        bad_return "A return does not go to one beyond the table", GP, BEYOND, cs=BEYOND
        bad_return "A return does not go to data", GP, USER_DATA_0, cs=USER_DATA
        bad_return "A return does not go to code whose DPL is not the RPL asked for", GP, KERNEL_CODE, cs=KERNEL_CODE+3
        bad_return "A return does not go to conforming code of DPL above RPL", GP, CONFORMING_3, cs=CONFORMING_3
        bad_return "A return does not go to code that is not present", NP, ABSENT_CODE, cs=ABSENT_CODE
        bad_return "A return does not go beyond the end of its segment", GP, 0, cs=SHORT_CODE
        bad_return "A stack segment returned to must not be null", GP, 0, ss=0
        bad_return "A stack segment returned to must be in the table", GP, BEYOND, ss=BEYOND+3
        bad_return "A stack segment returned to: its RPL must be the new level", GP, USER_DATA_0, ss=USER_DATA_0
        bad_return "A stack segment returned to: its DPL must be the new level", GP, KERNEL_DATA, ss=KERNEL_DATA+3
        bad_return "A stack segment returned to must be writable", GP, USER_CODE_0, ss=USER_CODE
        bad_return "A stack segment returned to must be present: #SS with it", STACK_FAULT, ABSENT_3, ss=ABSENT_3+3

        experiment "A return never goes inward"
        attempt ring=3
        push    KERNEL_CODE
        push    offset 1f
1:      retf
        caught  GP, error=KERNEL_CODE, eip=1b, ring=3, user_esp=user_stack_top-8
        attempt ring=3
        push    2
        push    KERNEL_CODE
        push    offset 1f
1:      iretd
        caught  GP, error=KERNEL_CODE, eip=1b, ring=3, user_esp=user_stack_top-12

        experiment "IRET at level 3 leaves IF and IOPL as they are, and raises nothing"
        attempt ring=3, flags=FLAG_IF
        push    2 | FLAG_IOPL | FLAG_DF
        push    USER_CODE
        push    offset 1f
        iretd
1:      caught  NOTHING, eip=1b, ring=3, set=FLAG_IF|FLAG_DF, clear=FLAG_IOPL

        experiment "IRET with a 16-bit operand pops words, and keeps the upper half of EFLAGS"
        attempt flags=FLAG_AC
        push    word ptr 2 | FLAG_DF
        push    word ptr KERNEL_CODE
        push    word ptr offset 1f
        iretw
1:      caught  NOTHING, eip=1b, set=FLAG_DF|FLAG_AC

        jmp     finish

.section .data
.balign 4
zero_to_one:
        .long   0, 1
