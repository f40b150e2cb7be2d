# interrupts.s: when an interrupt from outside is taken: STI, POPF, HLT, REP; and what goes before it.
#
# Mirrors: Intel SDM volume 3A, sections 6.8 "Enabling and disabling interrupts" and 6.9 "Priority among simultaneous
# exceptions and interrupts".
#
# The interval timer makes the interrupts: IRQ 0, vector 20h. `make_pending` waits, interrupts off, until the interrupt
# controller has it: then it is taken at the first boundary between instructions that lets it through.

.include "debug_log.inc"

vector IRQ_0, INTERRUPT_GATE_32                 # the first vector behind the exceptions, 20h
vector RETURNS, TRAP_GATE_32, KERNEL_CODE, returns, dpl=3

.equ PIC_COMMAND, 0x20
.equ PIC_MASK, 0x21
.equ PIT_CHANNEL_0, 0x40
.equ PIT_CONTROL, 0x43

.section .text
returns:
        iretd

# Starts the timer for one interrupt after AX ticks of 838 ns. Changes EAX, EDX.
start_timer:
        push    eax
        out_byte PIC_MASK, 0xFE                 # IRQ 0 only
        out_byte PIT_CONTROL, 0b00110000        # channel 0, both bytes, mode 0: count down once
        pop     eax
        mov     dx, PIT_CHANNEL_0
        out     dx, al
        mov     al, ah
        out     dx, al
        ret

# Waits until IRQ 0 is pending. Changes EAX, EDX.
make_pending:
        mov     eax, 10
        call    start_timer
        out_byte PIC_COMMAND, 0x0A              # its command port shall read as what is requested
1:      in      al, dx
        test    al, 1
        jz      1b
        ret

.macro end_of_interrupt
        out_byte PIC_COMMAND, 0x20
.endm

main:
        start_log

# ---- the shadow of STI (6.8.3) --------------------------------------------------------------------------------------

        experiment "Behind STI one more instruction is executed before an interrupt is taken"
        call    make_pending
        attempt
        sti
        nop
1:      nop
        caught  IRQ_0, eip=1b, set=FLAG_IF
        end_of_interrupt

        experiment "STI and CLI together let nothing in"
        call    make_pending
        attempt
        sti
        cli
        nop
1:      caught  NOTHING, eip=1b, clear=FLAG_IF

        experiment "POPF has no shadow: the interrupt comes at once"
        attempt
        push    2 | FLAG_IF
        popfd
1:      nop
        caught  IRQ_0, eip=1b, set=FLAG_IF
        end_of_interrupt

        experiment "Nor has IRET"
        call    make_pending
        attempt
        push    2 | FLAG_IF
        push    KERNEL_CODE
        push    offset 1f
        iretd
        nop
1:      nop
        caught  IRQ_0, eip=1b, set=FLAG_IF
        end_of_interrupt

        experiment "At level 3 an interrupt finds the stack of level 0"
        call    make_pending
        attempt ring=3, flags=FLAG_IF
1:      nop
        caught  IRQ_0, eip=1b, ring=3, set=FLAG_IF
        check_bits "IF in the handler", [seen_eflags], FLAG_IF, 0
        end_of_interrupt

        experiment "An interrupt that finds no gate is an exception with EXT"
        call    make_pending
        mov     byte ptr [idt + 8 * IRQ_0 + 5], INTERRUPT_GATE_32
        attempt
        sti
        nop
1:      nop
        caught  NP, error=IRQ_0*8+IDT+EXT, eip=1b, set=FLAG_IF
        mov     byte ptr [idt + 8 * IRQ_0 + 5], PRESENT + INTERRUPT_GATE_32
        end_of_interrupt

# ---- HLT ------------------------------------------------------------------------------------------------------------

        experiment "STI and HLT: an interrupt that waits already wakes the processor, with the address behind HLT"
        call    make_pending
        attempt
        sti
        hlt
1:      caught  IRQ_0, eip=1b, set=FLAG_IF
        end_of_interrupt

        experiment "So does one that comes later"
        mov     eax, 2000
        call    start_timer
        attempt
        sti
        hlt
1:      caught  IRQ_0, eip=1b, set=FLAG_IF
        end_of_interrupt

        experiment "The handler's IRET goes on behind the HLT"
        mov     word ptr [idt + 8 * IRQ_0], offset counts
        mov     dword ptr [watched], 0
        mov     eax, 2000
        call    start_timer
        attempt
        sti
        hlt
        cli
1:      caught  NOTHING, eip=1b
        check   "interrupts", [watched], 1
        mov     word ptr [idt + 8 * IRQ_0], offset own_stub
        jmp     1f
counts:
        push    eax
        push    edx
        inc     dword ptr ss:[watched]
        end_of_interrupt
        pop     edx
        pop     eax
        iretd
own_stub:
        push    IRQ_0
        jmp     trap
1:

# ---- REP ------------------------------------------------------------------------------------------------------------

        # The interrupt waits in the controller, masked. Then a thousand bytes are written to its mask, of which all but
        # the first let it through.
        .macro interrupted_rep
        call    make_pending
        out_byte PIC_MASK, 0xFF
        mov     esi, offset masks
        mov     ecx, 1000
        mov     edx, PIC_MASK
        attempt flags=FLAG_IF
1:      rep outsb
        .endm

        experiment "An interrupt comes between two turns of a REP, which goes on where it was"
        interrupted_rep
        caught  IRQ_0, eip=1b, set=FLAG_IF
        mov     eax, offset masks + 1000
        sub     eax, [seen_esi]
        check   "ECX, which goes with ESI", [seen_ecx], eax
        xor     ecx, ecx
        cmp     dword ptr [seen_ecx], 0
        setne   cl
        check   "there is something left", ecx, 1
        end_of_interrupt

        experiment "RF is set in its frame then"
        interrupted_rep
        caught  IRQ_0, eip=1b, set=FLAG_RF
        end_of_interrupt

        experiment "Between two instructions it is not"
        call    make_pending
        attempt
        sti
        nop
1:      nop
        caught  IRQ_0, eip=1b, clear=FLAG_RF
        end_of_interrupt

# ---- priorities (6.9, table 6-2) ------------------------------------------------------------------------------------

        experiment "The trap of a single step goes before an interrupt"
        call    make_pending
        out_byte PIC_MASK, 0xFF                 # it waits in the controller ...
        mov     al, 0xFE
        attempt flags=FLAG_TF+FLAG_IF
        out     dx, al                          # ... until here
1:      nop
        caught  IRQ_0, eip=1b, set=FLAG_TF+FLAG_IF
        logged  DR6_BS, 1b
        end_of_interrupt

        experiment "So does that of a breakpoint on data"
        call    make_pending
        break_at watched, ON_WRITE+DWORD_LONG
        attempt
        sti
        mov     dword ptr [watched], eax
1:      nop
        caught  IRQ_0, eip=1b
        break_off
        logged  1, 1b
        end_of_interrupt

        experiment "A breakpoint on the next instruction comes behind it"
        call    make_pending
        break_at 1f, ON_EXECUTION, FLAG_RF
        attempt
        sti
        nop
1:      nop
        caught  IRQ_0, eip=1b
        break_off
        logged  1,
        end_of_interrupt

        experiment "So does a fault of the next instruction"
        call    make_pending
        attempt
        sti
        nop
1:      mov     eax, cr5
        caught  IRQ_0, eip=1b
        end_of_interrupt

        experiment "INT n goes before: it is part of an instruction"
        call    make_pending
        attempt
        sti
        int     RETURNS                 # through a trap gate, which leaves IF set
        trapped IRQ_0
        check   "EIP", [seen_frame], "offset returns"
        end_of_interrupt

        jmp     finish

.section .data
masks:  .byte   0xFF
        .skip   999, 0xFE
