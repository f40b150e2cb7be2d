# debug_ports.s: breakpoints on I/O ports.
#
# Mirrors: Intel SDM volume 3B, section 17.3.1.2 "Data memory and I/O breakpoint exception conditions".

.include "debug_log.inc"

.section .text
main:
        start_log

        experiment "With CR4.DE a breakpoint may be on a port"
        mov     eax, CR4_DE
        mov     cr4, eax
        break_at 0x80, ON_PORT+BYTE_LONG
        attempt
        out     0x80, al
1:      in      al, 0x80
2:      out     0x81, al
        caught  NOTHING
        break_off
        logged  1, 1b, 2b

        experiment "A word or doubleword that reaches to it counts"
        break_at 0x81, ON_PORT+BYTE_LONG
        attempt
        out     0x80, ax
1:      out     0x7E, eax
2:      out     0x7D, eax
        out     0x80, al
        caught  NOTHING
        break_off
        logged  1, 1b, 2b

        experiment "A breakpoint of a word covers two ports"
        break_at 0x80, ON_PORT+WORD_LONG
        attempt
        out     0x81, al
1:      out     0x82, al
        out     0x7F, al
        caught  NOTHING
        break_off
        logged  1, 1b

        experiment "Memory at the address of the port is another thing"
        break_at watched, ON_PORT+BYTE_LONG
        attempt
        mov     [watched], al
        caught  NOTHING
        break_off
        logged  1,

        experiment "INS and OUTS are watched turn by turn"
        break_at 0x80, ON_PORT+BYTE_LONG
        mov     esi, offset watched
        mov     edx, 0x80
        mov     ecx, 2
        attempt
1:      rep outsb
2:      caught  NOTHING
        break_off
        logged  1, 1b, 2b

        jmp     finish
