# apic64.s: the local APIC and the I/O APIC: priorities, the end of an interrupt, the timer, messages to oneself.
#
# Mirrors: Intel SDM volume 3A, chapter 10 "Advanced programmable interrupt controller", and the data sheet of the
# 82093AA I/O APIC.
#
# Every interrupt is noted in a list, and the list is compared: its first one is the lowest byte. Interrupts are off but
# between STI and CLI (`let_in`). Handlers say EOI, or leave it to the experiment.

.include "base64.inc"

.equ LAPIC, 0xFEE00000                  # in R15
.equ ID, 0x20
.equ VERSION, 0x30
.equ TPR, 0x80
.equ PPR, 0xA0
.equ EOI, 0xB0
.equ LDR, 0xD0
.equ DFR, 0xE0
.equ SVR, 0xF0
.equ ISR, 0x100                         # eight registers each; of vector 41h it is the third, bit 1
.equ TMR, 0x180
.equ IRR, 0x200
.equ ESR, 0x280
.equ ICR, 0x300
.equ ICR_HIGH, 0x310
.equ LVT_TIMER, 0x320
.equ LVT_LINT0, 0x350
.equ LVT_ERROR, 0x370
.equ INITIAL_COUNT, 0x380
.equ CURRENT_COUNT, 0x390
.equ DIVIDE, 0x3E0

.equ ENABLE, 0x100
.equ SPURIOUS, 0x5F
.equ MASKED, 1 << 16
.equ PERIODIC, 1 << 17
.equ EXT_INT, 7 << 8
.equ NMI_MODE, 4 << 8
.equ LOWEST_PRIORITY, 1 << 8
.equ LOGICAL, 1 << 11
.equ TO_SELF, 1 << 18
.equ TO_ALL, 2 << 18
.equ TO_OTHERS, 3 << 18
.equ DIVIDE_BY_1, 0xB
.equ DIVIDE_BY_128, 0xA

.equ IOAPIC, 0xFEC00000                 # in R14
.equ IOWIN, 0x10
.equ REDIRECTION, 0x10                  # entry n has the registers 10h + 2n and 11h + 2n
.equ LEVEL, 1 << 15
.equ REMOTE_IRR, 1 << 14

.equ APIC_BASE, 0x1B

.equ PIC_COMMAND, 0x20
.equ PIC_MASK, 0x21
.equ PIT_CHANNEL_0, 0x40
.equ PIT_CONTROL, 0x43
.equ UART_IIR, COM1 + 2                 # read: why it interrupts

# Vectors 20h to 5Fh: a stub of 16 bytes each, which notes its number.
.section .data.idt
.set number, 0x20
.rept 0x40
        gate    INTERRUPT_GATE, KERNEL_CODE_64, (noting_stubs+16*(number-0x20)), 0, 0, 1, 0
    .set number, number + 1
.endr

.section .pages
devices:        .skip 4096              # the page directory of the last GB below 4 GB

.section .bss
.balign 8
taken:          .skip 16                # the vectors of the interrupts, a byte each
taken_end:      .skip 8
silent:         .skip 8                 # handlers do not say EOI
quiet_at:       .skip 8                 # the UART is made to take its request back at so many interrupts

.section .text
.balign 16
noting_stubs:
.set number, 0x20
.rept 0x40
        .balign 16
        push    number
        jmp     note
    .set number, number + 1
.endr

note:
        push    rax
        push    rdx
        mov     rax, [rsp + 16]
        mov     rdx, [taken_end]
        mov     [rdx], al
        inc     qword ptr [taken_end]
        mov     rax, [taken_end]
        sub     rax, offset taken
        cmp     rax, [quiet_at]
        jne     1f
        mov     edx, UART_IIR
        in      al, dx
1:      cmp     qword ptr [silent], 0
        jne     1f
        mov     dword ptr [r15 + EOI], 0
1:      pop     rdx
        pop     rax
        add     rsp, 8
        iretq

.macro lapic register, value
        mov     dword ptr [r15 + \register], \value
.endm

.macro ioapic register, value
        mov     dword ptr [r14], \register
        mov     dword ptr [r14 + IOWIN], \value
.endm

.macro send vector
        lapic   ICR, TO_SELF+\vector
.endm

.macro let_in
        sti
        nop
        nop
        cli
.endm

.macro check_register what, register, expected
        mov     eax, [r15 + \register]
        check   "\what", rax, "\expected"
.endm

.macro check_entry what, pin, expected
        mov     dword ptr [r14], REDIRECTION + 2 * \pin
        mov     eax, [r14 + IOWIN]
        check   "\what", rax, "\expected"
.endm

# Compares the list, and empties it.
.macro interrupts expected
        check   "interrupts", [taken], \expected
        call    forget
.endm

# Everything as at the beginning.
.macro start title
        experiment "\title"
        call    forget
        mov     qword ptr [silent], 0
        mov     qword ptr [quiet_at], 0
        lapic   SVR, ENABLE+SPURIOUS
        lapic   TPR, 0
.endm

forget:
        mov     qword ptr [taken], 0
        mov     qword ptr [taken_end], offset taken
        ret

# Waits until there have been CL interrupts.
wait_for:
        sti
1:      mov     rax, [taken_end]
        sub     rax, offset taken
        cmp     al, cl
        jb      1b
        cli
        ret

# Serves the 8259A by asking it. Changes EAX, EDX; the zero flag is set if there was no request.
poll_8259a:
        out_byte PIC_COMMAND, 0x0C
        in      al, dx
        test    al, 0x80
        jz      1f
        out_byte PIC_COMMAND, 0x20
        test    al, al                          # that was not zero either
1:      ret

# Starts the PIT: its output falls now, and rises in 100 ticks of 838 ns. IRQ 0 is the one that the 8259A lets through.
start_pit:
        out_byte PIT_CONTROL, 0b00110000        # channel 0, both bytes, mode 0: count down once
        out_byte PIC_MASK, 0xFE
1:      call    poll_8259a                      # of what came before nothing shall remain
        jnz     1b
        out_byte PIT_CHANNEL_0, 100
        out_byte PIT_CHANNEL_0, 0
        ret

# ... and waits until it has risen, and the 8259A has seen it and been served.
pit_to_its_end:
        call    start_pit
1:      call    poll_8259a
        jz      1b
        out_byte PIC_MASK, 0xFF
        ret

# ... or until it is requested there.
pit_to_8259a:
        call    start_pit
        out_byte PIC_COMMAND, 0x0A              # its command port shall read as what is requested
1:      in      al, dx
        test    al, 1
        jz      1b
        ret

main:
        mov     dword ptr [pdpt + 8 * 3], offset devices + PAGE_ALL
        mov     dword ptr [devices + 8 * 0x1F6], IOAPIC + PAGE_ALL + PAGE_2MB
        mov     dword ptr [devices + 8 * 0x1F7], LAPIC + PAGE_ALL + PAGE_2MB
        mov     r15d, LAPIC
        mov     r14d, IOAPIC

# ---- what there is (10.4) -------------------------------------------------------------------------------------------

        experiment "CPUID and a register of the processor tell of it"
        mov     eax, 1
        cpuid
        mov     edi, ebx
        check_bits "APIC", rdx, 1<<9, 1<<9
        shr     edi, 24
        check   "first number", rdi, 0
        mov     ecx, APIC_BASE
        rdmsr
        shl     rdx, 32
        or      rax, rdx
        mov     edi, LAPIC + 0x900      # enabled, and of the first processor
        check   "base", rax, rdi

        experiment "After a reset it is not enabled, and all entries of the local vector table are masked"
        check_register "SVR", SVR, 0xFF
        check_register "timer", LVT_TIMER, MASKED
        check_register "LINT0", LVT_LINT0, MASKED
        check_register "errors", LVT_ERROR, MASKED
        check_register "number", ID, 0
        check_register "version", VERSION, 0x50014

        experiment "As long as it is not enabled, entries cannot be unmasked"
        lapic   LVT_TIMER, 0x31
        check_register "timer", LVT_TIMER, MASKED+0x31

        start   "Enabled, they can"
        lapic   LVT_TIMER, 0x31
        check_register "timer", LVT_TIMER, 0x31
        lapic   LVT_TIMER, MASKED+0x31

# ---- priorities (10.8) ----------------------------------------------------------------------------------------------

        start   "A message to oneself is an interrupt"
        send    0x41
        check_register "IRR", IRR+0x20, 2
        let_in
        interrupts 0x41
        check_register "IRR", IRR+0x20, 0

        start   "Of several, the highest vector comes first"
        send    0x33
        send    0x51
        send    0x32
        let_in
        let_in
        let_in
        interrupts 0x323351

        start   "Two of one vector are one"
        send    0x33
        send    0x33
        let_in
        let_in
        interrupts 0x33

        start   "Until it is ended, those of its class and below wait"
        mov     qword ptr [silent], 1
        send    0x41
        let_in
        check_register "ISR", ISR+0x20, 2
        check_register "PPR", PPR, 0x40
        send    0x4F
        send    0x3F
        let_in
        interrupts 0x41
        lapic   EOI, 0
        let_in
        interrupts 0x4F
        lapic   EOI, 0
        let_in
        interrupts 0x3F
        lapic   EOI, 0
        check_register "PPR", PPR, 0

        start   "One of a higher class does not, and it is ended first"
        mov     qword ptr [silent], 1
        send    0x41
        let_in
        send    0x50
        let_in
        interrupts 0x5041
        check_register "PPR", PPR, 0x50
        lapic   EOI, 0
        check_register "ISR", ISR+0x20, 2
        check_register "PPR", PPR, 0x40
        lapic   EOI, 0
        check_register "ISR", ISR+0x20, 0

        start   "While it is in service, its vector can be requested once more"
        mov     qword ptr [silent], 1
        send    0x41
        let_in
        send    0x41
        send    0x41
        let_in
        interrupts 0x41
        lapic   EOI, 0
        let_in
        interrupts 0x41
        lapic   EOI, 0
        let_in
        interrupts 0

        start   "The task priority holds back its class"
        lapic   TPR, 0x41
        check_register "PPR", PPR, 0x41
        send    0x4F
        let_in
        interrupts 0
        lapic   TPR, 0x3F
        let_in
        interrupts 0x4F

        start   "CR8 is the task priority"
        lapic   TPR, 0x45
        mov     rdi, cr8
        check   "CR8", rdi, 4
        mov     edi, 5
        mov     cr8, rdi
        check_register "TPR", TPR, 0x50
        send    0x5E
        let_in
        interrupts 0
        mov     edi, 4
        mov     cr8, rdi
        let_in
        interrupts 0x5E
        xor     edi, edi
        mov     cr8, rdi

        start   "An EOI without an interrupt does nothing"
        lapic   EOI, 0
        send    0x41
        let_in
        interrupts 0x41

        start   "Disabled, it keeps what has been requested"
        send    0x41
        lapic   SVR, SPURIOUS
        let_in
        interrupts 0
        check_register "IRR", IRR+0x20, 2
        lapic   SVR, ENABLE+SPURIOUS
        let_in
        interrupts 0x41

# ---- messages (10.6) ------------------------------------------------------------------------------------------------

        start   "To all is to oneself as well, to all others is not"
        lapic   ICR, TO_ALL+0x31
        let_in
        interrupts 0x31
        lapic   ICR, TO_OTHERS+0x32
        let_in
        interrupts 0

        start   "By number, or to everybody"
        lapic   ICR_HIGH, 0
        lapic   ICR, 0x31
        let_in
        lapic   ICR_HIGH, 0xFF000000
        lapic   ICR, 0x32
        let_in
        lapic   ICR_HIGH, 0x05000000
        lapic   ICR, 0x33
        let_in
        interrupts 0x3231

        start   "By a set of numbers, flat"
        lapic   DFR, 0xFFFFFFFF
        lapic   LDR, 0x06000000
        lapic   ICR_HIGH, 0x04000000
        lapic   ICR, LOGICAL+0x31
        let_in
        lapic   ICR_HIGH, 0x09000000
        lapic   ICR, LOGICAL+0x32
        let_in
        interrupts 0x31

        start   "By a set within a cluster"
        lapic   DFR, 0x0FFFFFFF
        lapic   LDR, 0x26000000
        lapic   ICR_HIGH, 0x24000000
        lapic   ICR, LOGICAL+0x31
        let_in
        lapic   ICR_HIGH, 0x34000000
        lapic   ICR, LOGICAL+0x32
        let_in
        lapic   ICR_HIGH, 0x29000000
        lapic   ICR, LOGICAL+0x33
        let_in
        interrupts 0x31
        lapic   DFR, 0xFFFFFFFF

        start   "To the one with the lowest priority: there is but one"
        lapic   ICR_HIGH, 0
        lapic   ICR, LOWEST_PRIORITY+0x31
        let_in
        interrupts 0x31

        start   "An NMI can be sent, too"
        attempt
        lapic   ICR_HIGH, 0
        lapic   ICR, NMI_MODE
        nop
        nop
        trapped NMI

# ---- errors (10.5.3) ------------------------------------------------------------------------------------------------

        start   "A register that is not there is an error, which is seen after a write to ESR, and until the next"
        lapic   ESR, 0
        mov     eax, [r15 + 0x40]
        lapic   ESR, 0
        check_register "ESR", ESR, 0x80
        lapic   ESR, 0
        check_register "ESR", ESR, 0

# ---- the timer (10.5.4) ---------------------------------------------------------------------------------------------

        start   "The timer counts down, and interrupts once"
        lapic   DIVIDE, DIVIDE_BY_1
        lapic   LVT_TIMER, 0x41
        lapic   INITIAL_COUNT, 200000
        mov     edi, [r15 + CURRENT_COUNT]
        mov     ecx, 1
        call    wait_for
        xor     eax, eax
        cmp     edi, 200000
        seta    al
        check   "more than it began with", rax, 0
        check_register "count", CURRENT_COUNT, 0
        call    pit_to_its_end
        let_in
        interrupts 0x41

        start   "HLT waits for it"
        lapic   INITIAL_COUNT, 1000000
        sti
        hlt
        cli
        interrupts 0x41

        start   "Periodic, it interrupts again and again"
        lapic   LVT_TIMER, PERIODIC+0x41
        lapic   INITIAL_COUNT, 300000
        mov     ecx, 4
        call    wait_for
        lapic   LVT_TIMER, MASKED+PERIODIC+0x41
        interrupts 0x41414141

        start   "Masked, it counts in silence"
        lapic   INITIAL_COUNT, 1000
        call    pit_to_its_end
        let_in
        interrupts 0

        start   "A count of 0 stops it"
        lapic   INITIAL_COUNT, 0
        lapic   LVT_TIMER, PERIODIC+0x41
        call    pit_to_its_end
        let_in
        interrupts 0
        check_register "count", CURRENT_COUNT, 0

        start   "A divisor slows it down"
        lapic   DIVIDE, DIVIDE_BY_128
        lapic   LVT_TIMER, 0x41
        lapic   INITIAL_COUNT, 0x7FFFFFFF
        call    pit_to_its_end                  # 84 microseconds at least, that is 655 counts; not ten seconds
        mov     edi, 0x7FFFFFFF
        sub     edi, [r15 + CURRENT_COUNT]
        xor     eax, eax
        cmp     edi, 600
        setb    al
        cmp     edi, 78000000
        setae   ah
        check   "too few, too many", rax, 0
        lapic   LVT_TIMER, MASKED
        lapic   INITIAL_COUNT, 0

# ---- the 8259A (10.5.1, 10.5.2) -------------------------------------------------------------------------------------

        start   "LINT0 open to it, the 8259A gets through whatever the priority, and there is nothing to end"
        mov     qword ptr [silent], 1
        lapic   TPR, 0xFF
        lapic   LVT_LINT0, EXT_INT
        call    pit_to_8259a
        let_in
        interrupts 0x20
        check_register "ISR", ISR+0x10, 0
        out_byte PIC_COMMAND, 0x20
        out_byte PIC_MASK, 0xFF

        start   "LINT0 masked, it does not"
        lapic   LVT_LINT0, MASKED+EXT_INT
        call    pit_to_8259a
        let_in
        interrupts 0
        call    pit_to_its_end

# ---- the I/O APIC ---------------------------------------------------------------------------------------------------

        start   "The I/O APIC has 24 pins, all masked"
        mov     dword ptr [r14], 1
        mov     eax, [r14 + IOWIN]
        shr     eax, 16
        check   "last pin", rax, 23
        check_entry "pin 0", 0, MASKED
        check_entry "pin 23", 23, MASKED

        start   "An entry keeps nothing in what is read only"
        ioapic  REDIRECTION+2*7, MASKED+0x5731
        check_entry "pin 7", 7, MASKED+0x0731
        ioapic  REDIRECTION+2*7, MASKED

        start   "The timer of the PC is on pin 2"
        ioapic  REDIRECTION+2*2+1, 0
        ioapic  REDIRECTION+2*2, 0x45
        call    pit_to_its_end
        let_in
        interrupts 0x45

        start   "An edge is one interrupt, however long the line is high"
        let_in
        interrupts 0
        call    pit_to_its_end
        let_in
        let_in
        interrupts 0x45
        check_register "TMR", TMR+0x20, 0

        start   "Masked, it is lost"
        ioapic  REDIRECTION+2*2, MASKED+0x45
        call    pit_to_its_end
        ioapic  REDIRECTION+2*2, 0x45
        let_in
        interrupts 0
        ioapic  REDIRECTION+2*2, MASKED

        start   "A level comes again after its end, as long as it lasts"
        ioapic  REDIRECTION+2*4+1, 0
        ioapic  REDIRECTION+2*4, LEVEL+0x46
        mov     qword ptr [quiet_at], 3
        out_byte UART_IER, 2            # the transmitter is empty: a request until IIR is read
        mov     ecx, 3
        call    wait_for
        let_in
        interrupts 0x464646
        check_entry "pin 4", 4, LEVEL+0x46
        out_byte UART_IER, 0

        start   "Until then Remote IRR is set, and TMR says that it is a level"
        mov     qword ptr [silent], 1
        mov     qword ptr [quiet_at], 2
        out_byte UART_IER, 2
        mov     ecx, 1
        call    wait_for
        let_in
        check_entry "pin 4", 4, LEVEL+REMOTE_IRR+0x46
        check_register "TMR", TMR+0x20, 0x40
        lapic   EOI, 0
        let_in
        lapic   EOI, 0
        let_in
        interrupts 0x4646
        check_entry "pin 4", 4, LEVEL+0x46
        out_byte UART_IER, 0

        start   "A level that is there when its pin is unmasked comes"
        ioapic  REDIRECTION+2*4, MASKED+LEVEL+0x46
        out_byte UART_IER, 2
        let_in
        interrupts 0
        mov     qword ptr [quiet_at], 1
        ioapic  REDIRECTION+2*4, LEVEL+0x46
        let_in
        interrupts 0x46
        ioapic  REDIRECTION+2*4, MASKED
        out_byte UART_IER, 0

        start   "A pin leads where its entry says: a set of processors, or nobody"
        lapic   LDR, 0x01000000
        ioapic  REDIRECTION+2*2+1, 0x01000000
        ioapic  REDIRECTION+2*2, LOGICAL+0x45
        call    pit_to_its_end
        let_in
        interrupts 0x45
        ioapic  REDIRECTION+2*2+1, 0x02000000
        call    pit_to_its_end
        let_in
        interrupts 0
        ioapic  REDIRECTION+2*2, MASKED

        start   "An NMI can come from a pin"
        ioapic  REDIRECTION+2*2+1, 0
        ioapic  REDIRECTION+2*2, NMI_MODE
        attempt
        call    pit_to_its_end
        nop
        trapped NMI
        ioapic  REDIRECTION+2*2, MASKED

        jmp     finish
