# debug.s: single steps, breakpoints on instructions and data, and what DR6 and RF say.
#
# Mirrors: Intel SDM volume 3B, chapter 17, sections 17.2 "Debug registers" and 17.3 "Debug exceptions".
#
# debug_log.inc says how the programs of these experiments are watched.

.include "debug_log.inc"

vector RETURNS, TRAP_GATE_32, KERNEL_CODE, returns, dpl=3
vector OPEN, INTERRUPT_GATE_32, dpl=3
returns:
        iretd

main:
        start_log

# ---- single steps (17.3.1.4) ----------------------------------------------------------------------------------------

        experiment "The first step is the instruction behind the POPF that sets TF"
        attempt flags=FLAG_TF
        nop
1:      nop
2:      caught  NOTHING, set=FLAG_TF
        check_bits "TF in the frame", [log+LOG_EFLAGS], FLAG_TF+FLAG_RF, FLAG_TF
        logged  DR6_BS, 1b, 2b

        experiment "The POPF that clears TF is the last step"
        attempt flags=FLAG_TF
        push    2
1:      popfd
2:      nop
        caught  NOTHING, clear=FLAG_TF
        logged  DR6_BS, 1b, 2b

        experiment "A branch ends where it leads"
        attempt flags=FLAG_TF
        jmp     1f
        nop
1:      call    2f
        nop
2:      pop     eax
3:      caught  NOTHING
        logged  DR6_BS, 1b, 2b, 3b

        experiment "An IRET that sets TF lets one instruction pass"
        attempt
        push    2 | FLAG_TF
        push    KERNEL_CODE
        push    offset 1f
        iretd
1:      nop
2:      caught  NOTHING
        logged  DR6_BS, 2b

        experiment "A step at level 3 is a step as well"
        attempt ring=3, flags=FLAG_TF
        nop
1:      nop
2:      caught  NOTHING, ring=3
        check   "CS", [log+LOG_CS], USER_CODE
        logged  DR6_BS, 1b, 2b

        experiment "Each turn of a REP is a step; RF is set until the last"
        mov     esi, offset watched
        mov     edi, offset watched
        mov     ecx, 3
        attempt flags=FLAG_TF
1:      rep movsb
2:      caught  NOTHING
        check   "ECX after the first", [log+LOG_ECX], 2
        check   "ECX after the second", [log+LOG_SIZE+LOG_ECX], 1
        check_bits "RF after the first", [log+LOG_EFLAGS], FLAG_RF, FLAG_RF
        check_bits "RF after the last", [log+2*LOG_SIZE+LOG_EFLAGS], FLAG_RF, 0
        logged  DR6_BS, 1b, 1b, 2b

        experiment "A REP that does nothing is one step"
        xor     ecx, ecx
        attempt flags=FLAG_TF
        rep movsb
1:      caught  NOTHING
        logged  DR6_BS, 1b

        experiment "There is no trap between MOV SS and the next instruction"
        attempt flags=FLAG_TF
        mov     eax, ss
1:      mov     ss, eax
        nop
2:      nop
3:      caught  NOTHING
        logged  DR6_BS, 1b, 2b, 3b

        experiment "Nor behind POP SS"
        attempt flags=FLAG_TF
        push    ss
1:      pop     ss
        nop
2:      caught  NOTHING
        logged  DR6_BS, 1b, 2b

        experiment "But behind LSS, and behind STI"
        mov     dword ptr [watched], esp
        attempt flags=FLAG_TF
        lss     ebx, [watched+12]
1:      sti
2:      cli
3:      caught  NOTHING
        logged  DR6_BS, 1b, 2b, 3b

        experiment "INT n turns TF off: no trap in its handler, and none before the instruction behind it is done"
        attempt flags=FLAG_TF
        int     RETURNS
1:      nop
2:      caught  NOTHING
        logged  DR6_BS, 2b

        experiment "An exception comes instead of the trap, and its frame has TF set"
        attempt flags=FLAG_TF
        xor     ecx, ecx
1:      div     ecx
        caught  DE, eip=1b, set=FLAG_TF
        logged  DR6_BS, 1b

        experiment "PUSHF pushes TF"
        attempt flags=FLAG_TF
        pushfd
1:      pop     ecx
2:      caught  NOTHING
        check_bits "TF", [seen_ecx], FLAG_TF, FLAG_TF
        logged  DR6_BS, 1b, 2b

# ---- INT1 and INT3 --------------------------------------------------------------------------------------------------

        experiment "INT1 is #DB, a trap, and says nothing in DR6"
        attempt
        .byte   0xF1
1:      caught  NOTHING
        logged  0, 1b

        experiment "INT1 needs no gate of DPL 3"
        attempt ring=3
        .byte   0xF1
1:      caught  NOTHING, ring=3
        logged  0, 1b

        experiment "INT3 is a trap: the frame points behind it"
        attempt
        int3
1:      caught  BREAKPOINT, eip=1b
        logged  0,

# ---- RF in the frames of exceptions (17.3.1.1) ----------------------------------------------------------------------

        experiment "A fault's frame has RF set, for the instruction will be tried again"
        attempt
1:      mov     eax, cr5
        caught  UD, eip=1b, set=FLAG_RF
        attempt
        xor     ecx, ecx
1:      div     ecx
        caught  DE, eip=1b, set=FLAG_RF
        attempt
        mov     ecx, KERNEL_TSS
1:      mov     ds, ecx
        caught  GP, error=KERNEL_TSS, eip=1b, set=FLAG_RF

        experiment "That of an INT n, or INTO, which is behind the instruction, does not"
        attempt
        int     OPEN
1:      caught  OPEN, eip=1b, clear=FLAG_RF
        attempt
        mov     al, 0x7F
        inc     al
        into
1:      caught  OF, eip=1b, clear=FLAG_RF

        experiment "IRET loads RF, and the next instruction clears it"
        attempt
        push    2 | FLAG_RF
        push    KERNEL_CODE
        push    offset 1f
        iretd
1:      nop
        int     OPEN
2:      caught  OPEN, eip=2b, clear=FLAG_RF

# ---- breakpoints on instructions ------------------------------------------------------------------------------------

        experiment "A breakpoint comes before its instruction, with RF clear"
        break_at 1f, ON_EXECUTION, FLAG_RF
        xor     ecx, ecx
        attempt
        inc     ecx
1:      inc     ecx
        inc     ecx
        caught  NOTHING
        break_off
        check   "ECX", [log+LOG_ECX], 1
        check_bits "RF", [log+LOG_EFLAGS], FLAG_RF, 0
        check   "ECX at the end", [seen_ecx], 3
        logged  1, 1b

        experiment "RF lets one instruction pass: in a loop it is hit each time"
        break_at 1f, ON_EXECUTION, FLAG_RF
        mov     ecx, 3
        attempt
1:      dec     ecx
        jnz     1b
        caught  NOTHING
        break_off
        logged  1, 1b, 1b, 1b

        experiment "Without RF the instruction never begins"
        break_at 1f, ON_EXECUTION
        attempt
1:      nop
        caught  DB, eip=1b              # the log is full
        break_off
        logged  1, 1b, 1b, 1b, 1b, 1b, 1b, 1b, 1b

        experiment "RF stays while a REP goes on"
        break_at 1f, ON_EXECUTION, FLAG_RF
        mov     esi, offset watched
        mov     edi, offset watched
        mov     ecx, 3
        attempt
1:      rep movsb
        caught  NOTHING
        break_off
        logged  1, 1b

        experiment "Only the first byte of an instruction counts"
        break_at 1f+1, ON_EXECUTION, FLAG_RF
        attempt
1:      mov     eax, 0x90909090
        caught  NOTHING
        break_off
        logged  1,

        experiment "A breakpoint comes before any fault of its instruction"
        break_at 1f, ON_EXECUTION, FLAG_RF
        xor     ecx, ecx
        attempt
1:      div     ecx
        caught  DE, eip=1b
        break_off
        logged  1, 1b

        experiment "Two breakpoints at one place are told together"
        break_at 1f, ON_EXECUTION, FLAG_RF
        mov     eax, dr0
        mov     dr1, eax
        mov     eax, DR7_NONE + G0 + G1
        mov     dr7, eax
        attempt
1:      nop
        caught  NOTHING
        break_off
        logged  3, 1b

        experiment "The step before and the breakpoint after are two exceptions, in this order"
        break_at 1f, ON_EXECUTION, FLAG_RF
        attempt flags=FLAG_TF
        nop
1:      nop
2:      caught  NOTHING
        break_off
        mov     ebx, offset log
        check   "EIP of the step", [log+LOG_EIP], "offset 1b"
        check   "EIP behind", [log+LOG_SIZE+LOG_EIP], "offset 2b"
        mov     dword ptr [log_end], offset log

# ---- breakpoints on data --------------------------------------------------------------------------------------------

        .macro data_break what, where, dr6, instruction:vararg
        break_at watched+\where, \what
        mov     ebx, offset watched
        attempt
        \instruction
1:      caught  NOTHING
        break_off
        .ifc \dr6,0
        logged  0,
        .else
        logged  \dr6, 1b
        .endif
        .endm

        experiment "A write is told of when its instruction is done, with RF clear"
        break_at watched, ON_WRITE+DWORD_LONG
        attempt
        mov     dword ptr [watched], 5
1:      nop
        caught  NOTHING
        break_off
        check_bits "RF", [log+LOG_EFLAGS], FLAG_RF, 0
        check   "what was written", [watched], 5
        logged  1, 1b

        experiment "A breakpoint on writes does not tell of reads"
        data_break ON_WRITE+DWORD_LONG, 0, 0, mov eax, [ebx]
        experiment "One on reads and writes tells of both"
        data_break ON_ACCESS+DWORD_LONG, 0, 1, mov eax, [ebx]
        data_break ON_ACCESS+DWORD_LONG, 0, 1, mov [ebx], eax
        data_break ON_ACCESS+DWORD_LONG, 0, 1, inc dword ptr [ebx]
        experiment "CMP only reads, INC writes"
        data_break ON_WRITE+DWORD_LONG, 0, 0, cmp dword ptr [ebx], 1
        data_break ON_WRITE+DWORD_LONG, 0, 1, inc dword ptr [ebx]

        experiment "Any byte in common will do"
        data_break ON_WRITE+BYTE_LONG, 1, 1, mov [ebx], eax
        data_break ON_WRITE+BYTE_LONG, 1, 1, mov [ebx], ax
        data_break ON_WRITE+BYTE_LONG, 1, 0, mov [ebx], al
        data_break ON_WRITE+BYTE_LONG, 1, 1, mov [ebx+1], al
        data_break ON_WRITE+BYTE_LONG, 1, 0, mov [ebx+2], eax
        data_break ON_WRITE+DWORD_LONG, 4, 1, mov [ebx+7], al
        data_break ON_WRITE+DWORD_LONG, 4, 1, mov [ebx+1], eax
        data_break ON_WRITE+DWORD_LONG, 4, 0, mov [ebx], eax
        data_break ON_WRITE+DWORD_LONG, 4, 0, mov [ebx+8], eax

        experiment "The low bits of the address do not count"
        data_break ON_WRITE+WORD_LONG, 1, 1, mov [ebx], al
        data_break ON_WRITE+WORD_LONG, 1, 0, mov [ebx+2], al
        data_break ON_WRITE+DWORD_LONG, 6, 1, mov [ebx+4], al
        data_break ON_WRITE+DWORD_LONG, 6, 0, mov [ebx+8], al

        experiment "PUSH, CALL and string instructions write, too"
        break_at stack_top-0x40, ON_WRITE+DWORD_LONG
        attempt
        mov     esp, offset stack_top - 0x3C
        push    eax
1:      pop     eax
        call    2f
2:      caught  NOTHING, from=stack_top-0x40
        break_off
        logged  1, 1b, 2b

        experiment "Within a REP the trap comes behind the turn that did it, with RF set"
        break_at watched+4, ON_WRITE+DWORD_LONG
        mov     edi, offset watched
        mov     ecx, 3
        xor     eax, eax
        attempt
1:      rep stosd
        caught  NOTHING
        break_off
        check   "ECX", [log+LOG_ECX], 1
        check_bits "RF", [log+LOG_EFLAGS], FLAG_RF, FLAG_RF
        logged  1, 1b

        experiment "All breakpoints that were hit are told together"
        break_at watched, ON_WRITE+DWORD_LONG
        mov     eax, offset watched + 2
        mov     dr1, eax
        mov     eax, offset watched + 4
        mov     dr2, eax
        mov     eax, DR7_NONE + 0x2A + (ON_WRITE+DWORD_LONG)*0x1010000 + (ON_ACCESS+BYTE_LONG)*0x100000
        mov     dr7, eax
        attempt
        mov     dword ptr [watched], eax
1:      caught  NOTHING
        break_off
        logged  3, 1b

        experiment "A step and a breakpoint are told together"
        break_at watched, ON_WRITE+DWORD_LONG
        attempt flags=FLAG_TF
        mov     dword ptr [watched], eax
1:      caught  NOTHING
        break_off
        logged  DR6_BS+1, 1b

        experiment "One that is switched on by L works as well as by G"
        break_at watched, ON_WRITE+DWORD_LONG
        mov     eax, DR7_NONE + 1 + ((ON_WRITE+DWORD_LONG) << 16)
        mov     dr7, eax
        attempt
        mov     dword ptr [watched], eax
1:      caught  NOTHING
        break_off
        logged  1, 1b

        experiment "The trap of MOV SS waits for the next instruction"
        break_at watched_ss, ON_ACCESS+WORD_LONG
        attempt
        mov     ss, word ptr [watched_ss]
        nop
1:      nop
        caught  NOTHING
        break_off
        logged  1, 1b

# ---- the registers themselves (17.2) --------------------------------------------------------------------------------

        experiment "With CR4.DE there are no DR4 and DR5"
        mov     eax, CR4_DE
        mov     cr4, eax
        attempt
1:      .byte   0x0F, 0x21, 0xE0        # mov eax, dr4
        caught  UD, eip=1b
        attempt
1:      .byte   0x0F, 0x23, 0xE8        # mov dr5, eax
        caught  UD, eip=1b
        xor     eax, eax
        mov     cr4, eax

        experiment "Without it they are other names of DR6 and DR7"
        attempt
        mov     eax, 0x00000400
        .byte   0x0F, 0x23, 0xE8        # mov dr5, eax
        mov     eax, 0xFFFF0FF3
        .byte   0x0F, 0x23, 0xE0        # mov dr4, eax
        mov     ecx, dr6
        .byte   0x0F, 0x21, 0xEA        # mov edx, dr5
        caught  NOTHING
        check   "DR6", [seen_ecx], 0xFFFF0FF3
        check   "DR5", [seen_edx], 0x400
        mov     eax, DR6_NONE
        mov     dr6, eax

        experiment "Bits that there are not stay as they are"
        xor     eax, eax
        mov     dr6, eax
        mov     dr7, eax
        mov     ecx, dr6
        check   "DR6 after 0", ecx, DR6_NONE
        mov     ecx, dr7
        check   "DR7 after 0", ecx, DR7_NONE

        experiment "Debug registers are for level 0"
        attempt ring=3
1:      mov     eax, dr0
        caught  GP, error=0, eip=1b, ring=3
        attempt ring=3
1:      mov     dr7, eax
        caught  GP, error=0, eip=1b, ring=3

        experiment "With DR7.GD set touching one is #DB, a fault, and DR6 says BD"
        mov     eax, DR7_NONE + DR7_GD
        mov     dr7, eax
        attempt
1:      mov     eax, dr0                # goes through when it is tried again: the exception has cleared GD
        mov     ecx, dr7
        caught  NOTHING
        check   "DR7 afterwards", [seen_ecx], DR7_NONE
        logged  DR6_BD, 1b
        mov     eax, DR7_NONE + DR7_GD
        mov     dr7, eax
        attempt
1:      mov     dr3, eax
        caught  NOTHING
        logged  DR6_BD, 1b

        experiment "At level 3 it is #GP all the same"
        mov     eax, DR7_NONE + DR7_GD
        mov     dr7, eax
        attempt ring=3
1:      mov     eax, dr0
        caught  GP, error=0, eip=1b, ring=3
        attempt
        mov     eax, dr7                # #DB, which clears GD
1:      caught  NOTHING
        mov     dword ptr [log_end], offset log

        jmp     finish
