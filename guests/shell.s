# shell.s: a small kernel one can talk to over the serial line.
#
# The same base as counter.s, and what a kernel needs besides: input by interrupt, a line editor, access to memory that
# may not be there, and a task in ring 3 (ring3.inc).

.intel_syntax noprefix

.equ HZ, 100                            # ticks a second

.include "serial.inc"
.include "boot.inc"
.include "paging.inc"
.include "interrupts.inc"
.include "decimal.inc"

.equ BACKSPACE, 8
.equ LINE_FEED, 10
.equ RETURN, 13
.equ DELETE, 127
.equ LINE_LENGTH, 79
.equ PAGE_FAULT, 14

.section .bss
ticks:          .skip 4
line:           .skip LINE_LENGTH + 1   # what is being typed, ended by a NUL

# Keys travel from the interrupt handler to the shell through a ring of 256 bytes, so that a one-byte index wraps
# around by itself. Only the handler moves `head`, only the shell moves `tail`: equal means empty.
ring:           .skip 256
head:           .skip 1                 # where the next key goes
tail:           .skip 1                 # where the next key is taken

# How the last fault happened; `recover` is where to go on after a fault that is expected, else 0.
.balign 4
recover:        .skip 4
fault_address:  .skip 4                 # CR2
fault_error:    .skip 4
fault_eip:      .skip 4

.section .text
main:
        call    interrupts_init
        mov     dword ptr [handlers + 4 * IRQ0], offset tick
        mov     dword ptr [handlers + 4 * IRQ4], offset key_came
        mov     dword ptr [handlers + 4 * PAGE_FAULT], offset page_fault
        call    ring3_init
        out_byte PIC1_DATA, 0b11101110  # let IRQ 0 and IRQ 4 through
        out_byte UART_IER, 1            # the UART may say when a byte has come
        call    timer_init
        sti
        write   "shell: type help for a list of commands\r\n"

prompt: write   "$ "
        call    read_line
        cmp     byte ptr [line], 0
        je      prompt
        call    run_line
        jmp     prompt

# ---- input ----------------------------------------------------------------------------------------------------

# Interrupt handler of IRQ 4. The UART asks once for all the bytes in its FIFO. When the ring is full, they are left
# there and the UART is told to be quiet: a full FIFO stops the sender, where a byte thrown away would be lost.
key_came:
        mov     dx, UART_LSR
        in      al, dx
        test    al, LSR_DATA_READY
        jz      2f
        movzx   ebx, byte ptr [head]
        lea     ecx, [ebx + 1]
        cmp     cl, [tail]
        je      1f
        mov     dx, UART_DATA
        in      al, dx
        mov     [ring + ebx], al
        mov     [head], cl
        jmp     key_came
1:      out_byte UART_IER, 0
2:      end_of_interrupt
        ret

# Waits for a key and returns it in AL. May change ECX, EDX.
read_key:
        cli
        movzx   eax, byte ptr [tail]
        cmp     al, [head]
        jne     1f
        sti                             # takes effect after HLT has begun: see counter.s
        hlt
        jmp     read_key
1:      mov     cl, [ring + eax]
        inc     byte ptr [tail]
        out_byte UART_IER, 1            # there is room again
        mov     al, cl
        sti
        ret

# Reads a line into `line`, echoing it, with backspace to correct it.
read_line:
        mov     edi, offset line        # where the next character goes
1:      call    read_key
        cmp     al, RETURN              # what a terminal sends ...
        je      3f
        cmp     al, LINE_FEED           # ... and what ends a line in a file
        je      3f
        cmp     al, BACKSPACE
        je      2f
        cmp     al, DELETE              # what most terminals send for the backspace key
        je      2f
        cmp     al, ' '
        jb      1b                      # some other control character
        cmp     edi, offset line + LINE_LENGTH
        je      1b                      # full
        stosb
        call    write_byte
        jmp     1b

2:      cmp     edi, offset line
        je      1b                      # nothing to take back
        dec     edi
        write   "\b \b"                 # step back, blank the character, step back again
        jmp     1b

3:      mov     byte ptr [edi], 0
        write   "\r\n"
        ret

# ---- commands -------------------------------------------------------------------------------------------------

.section .rodata
.balign 4
commands:                               # name, routine; ends with a 0
        .long   1f, help, 2f, uptime, 3f, peek, 4f, fault, 5f, ring3_demo, 6f, halt_machine, 7f, reboot, 0
1:      .asciz  "help"
2:      .asciz  "uptime"
3:      .asciz  "peek"
4:      .asciz  "fault"
5:      .asciz  "user"
6:      .asciz  "halt"
7:      .asciz  "reboot"

.section .text
# Runs the command that `line` begins with. Its routine gets ESI = what follows the name, and returns to our caller.
run_line:
        mov     esi, offset line        # find the end of the name, and put a NUL there
1:      lodsb
        cmp     al, ' '
        je      2f
        test    al, al
        jnz     1b
        dec     esi                     # no space: what follows is the empty string, the NUL that is there already
        jmp     3f
2:      mov     byte ptr [esi - 1], 0
3:      mov     ebp, esi

        mov     edi, offset commands
4:      mov     ebx, [edi]
        test    ebx, ebx
        jz      unknown_command
        mov     esi, offset line
5:      lodsb
        cmp     al, [ebx]
        jne     6f
        inc     ebx
        test    al, al                  # the same up to and including the NUL: the same word
        jnz     5b
        mov     esi, ebp
        jmp     [edi + 4]
6:      add     edi, 8
        jmp     4b

unknown_command:
        write   "there is no command "
        mov     esi, offset line
        call    write_string
        write   ": type help for a list\r\n"
        ret

.section .rodata
help_text:
        .ascii  "help       shows this\r\n"
        .ascii  "uptime     how long the timer has been ticking\r\n"
        .ascii  "peek ADDR  shows the four bytes at an address (hexadecimal)\r\n"
        .ascii  "fault      takes a page fault, reports it and goes on\r\n"
        .ascii  "user       runs tasks in ring 3, good ones and bad ones\r\n"
        .ascii  "halt       stops the CPU\r\n"
        .asciz  "reboot     resets the machine\r\n"

.section .text
help:
        mov     esi, offset help_text
        jmp     write_string

uptime:
        mov     eax, [ticks]
        mov     edi, eax                # the write routines keep EDI
        xor     edx, edx
        mov     ecx, HZ
        div     ecx
        call    write_decimal
        write   " seconds, "
        mov     eax, edi
        call    write_decimal
        write   " ticks\r\n"
        ret

halt_machine:
        write   "halted\r\n"
        jmp     stop

# Port CF9h, the reset control register of PC chipsets: bit 1 chooses a hard reset, bit 2 going from 0 to 1 does it.
.equ RESET_CONTROL, 0xCF9
reboot:
        write   "rebooting\r\n"
        mov     dx, UART_LSR            # a reset would swallow what the UART has not sent yet
1:      in      al, dx
        test    al, LSR_ALL_SENT
        jz      1b
        out_byte RESET_CONTROL, 0x02
        out_byte RESET_CONTROL, 0x06
        jmp     stop

# ---- memory that may not be there -------------------------------------------------------------------------------

# Reads memory that may not be mapped. Finding out beforehand would take a page walk by hand; the CPU walks anyway, so
# we let it, and say where to go on if it finds nothing.
peek:
        call    parse_hex
        jc      1f
        mov     edi, eax
        mov     dword ptr [recover], offset 2f
        mov     ebp, [edi]              # may fault
        mov     dword ptr [recover], 0
        mov     eax, edi
        call    write_hex
        write   ": "
        mov     eax, ebp
        call    write_hex
        write   "\r\n"
        ret
1:      write   "peek: give an address of up to eight hexadecimal digits, as in: peek c0007c00\r\n"
        ret
2:      write   "peek: "
        jmp     report_page_fault

# Writes to an address that nothing is mapped at.
.equ NOWHERE, 0xDEAD0000
fault:
        mov     dword ptr [recover], offset 1f
        mov     dword ptr ds:[NOWHERE], 1
1:      write   "fault: "
        call    report_page_fault
        write   "fault: the kernel goes on\r\n"
        ret

# Handler of exception 14.
page_fault:
        mov     eax, cr2                # the address, first of all: another page fault would overwrite it
        mov     [fault_address], eax
        mov     eax, [ebp + FRAME_ERROR]
        mov     [fault_error], eax
        mov     eax, [ebp + FRAME_EIP]
        mov     [fault_eip], eax
        test    dword ptr [ebp + FRAME_CS], 3
        jnz     task_page_fault         # ring 3: the task has to go, the kernel is well (ring3.inc)
        mov     eax, [recover]
        test    eax, eax
        jz      unexpected
        mov     dword ptr [recover], 0
        mov     [ebp + FRAME_EIP], eax  # IRETD would run the same instruction again: send it elsewhere
        ret

# The error code of a page fault:
#
#        31                  3   2     1     0
#       +---------------------+-----+-----+-----+    P    0: no page there; 1: a page, but not for this access
#       |          ...        | U/S | W/R |  P  |    W/R  1: a write
#       +---------------------+-----+-----+-----+    U/S  1: in ring 3
report_page_fault:
        write   "page fault at "
        mov     eax, [fault_address]
        call    write_hex
        write   ", error code "
        mov     eax, [fault_error]
        call    write_hex
        test    byte ptr [fault_error], 1
        jnz     1f
        write   " (not present"
        jmp     2f
1:      write   " (protection"
2:      test    byte ptr [fault_error], 2
        jnz     1f
        write   ", read"
        jmp     2f
1:      write   ", write"
2:      test    byte ptr [fault_error], 4
        jnz     1f
        write   ", ring 0"
        jmp     2f
1:      write   ", ring 3"
2:      write   "), EIP "
        mov     eax, [fault_eip]
        call    write_hex
        write   "\r\n"
        ret

# Reads the hexadecimal number at ESI into EAX (C0007C00, c0007c00 or 0xc0007c00). Carry set: there is none.
parse_hex:
        xor     edx, edx
        xor     eax, eax
        cmp     word ptr [esi], '0' + ('x' << 8)
        jne     1f
        add     esi, 2
1:      cmp     byte ptr [esi], 0       # nothing at all is not a number
        je      4f
2:      lodsb
        test    al, al
        jz      5f
        test    edx, 0xF0000000
        jnz     4f                      # a ninth digit would push the first one out
        cmp     al, '9'
        jbe     3f
        or      al, 0x20                # upper case to lower case
        sub     al, 'a' - '0' - 10
        cmp     al, '0' + 10
        jb      4f                      # between '9' and 'a'
3:      sub     al, '0'
        cmp     al, 16
        jae     4f                      # below '0' (it wrapped around) or above 'f'
        shl     edx, 4
        or      edx, eax
        jmp     2b
4:      stc
        ret
5:      mov     eax, edx
        clc
        ret

# Interrupt handler of IRQ 0.
tick:
        inc     dword ptr [ticks]
        end_of_interrupt
        ret

.include "ring3.inc"
