# counter.s: counts the ticks of a timer on the serial console, one number a line, for ever.
#
# The smallest kernel with paging and interrupts: real mode -> protected mode (boot.inc) -> paging with the kernel
# high (paging.inc) -> interrupts (interrupts.inc) -> the loop below. The count lives in a page that is mapped at a
# virtual address of its own, so that only a correct snapshot of RAM *and* of CR3 lets it go on with the next number.

.intel_syntax noprefix

.equ HZ, 20                             # ticks a second

.include "serial.inc"
.include "boot.inc"
.include "paging.inc"
.include "interrupts.inc"
.include "decimal.inc"

# The page of the count. Its frame lies in .bss; what matters is that this address leads there through a directory
# entry and a page table that nothing else uses.
#
#       0xD0000000 = 1101000000 | 0000000000 | 000000000000      directory entry 0x340, table entry 0, offset 0
.equ COUNT_PAGE, 0xD0000000
.equ TICKS, COUNT_PAGE + 0              # ticks that have happened: written by the interrupt handler
.equ SHOWN, COUNT_PAGE + 4              # ticks that have been printed: written by the loop

.section .bss
.balign 4096
count_table:    .skip 4096
count_frame:    .skip 4096

.section .text
main:
        # An entry that was not present is never in the TLB: filling it in needs no flush.
        mov     eax, offset count_table - KERNEL_BASE + PAGE_KERNEL
        mov     [page_directory + 4 * (COUNT_PAGE >> 22)], eax
        mov     eax, offset count_frame - KERNEL_BASE + PAGE_KERNEL
        mov     [count_table], eax

        write   "counter: paging is on, counting\r\n"

        call    interrupts_init
        mov     dword ptr [handlers + 4 * IRQ0], offset tick
        out_byte PIC1_DATA, 0b11111110  # let IRQ 0 through, nothing else
        call    timer_init

        # The handler only counts; printing, which takes long, is done here with interrupts on. If ticks come faster
        # than lines go out, TICKS runs ahead and no number is left out.
idle:
        cli                             # nothing may change between the look at TICKS and HLT
        mov     eax, ds:[SHOWN]
        cmp     eax, ds:[TICKS]
        jne     show
        sti                             # takes effect after the *next* instruction, so a tick cannot slip in before
        hlt                             # HLT and leave us asleep until the one after it
        jmp     idle
show:
        sti
        inc     eax
        mov     ds:[SHOWN], eax
        call    write_decimal
        write   "\r\n"
        jmp     idle

# Interrupt handler of IRQ 0: runs with interrupts off, registers saved by interrupts.inc.
tick:
        inc     dword ptr ds:[TICKS]
        end_of_interrupt
        ret
