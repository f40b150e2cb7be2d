# nmi64.s: non-maskable interrupts, and why a second one waits.
#
# Mirrors: Intel SDM volume 3A, sections 6.7 "Nonmaskable interrupt (NMI)" and 6.7.1 "Handling multiple NMIs".
#
# Nothing in the machine makes an NMI at a program's wish, so each one is asked for: whoever runs the guest sends it. Of
# one that has to wait nothing can be seen, so there a key is pressed when it has been sent.

.include "base64.inc"

vector RETURNS, to=returns, dpl=3

.section .bss
.balign 8
count:          .skip 8                 # of NMIs taken
depth:          .skip 8                 # of handlers that have not ended
deepest:        .skip 8
rips:           .skip 8 * 4             # where each came from
stacks:         .skip 8 * 4             # where each found its frame
during:         .skip 8                 # `count` at some point in the first handler
action:         .skip 8                 # what the first handler does

.section .text
returns:
        iretq

on_nmi:
        push    rax
        push    rdx
        push    rsi
        mov     rdx, [count]
        mov     rax, [rsp + 24]
        mov     [rips + 8 * rdx], rax
        lea     rax, [rsp + 24]
        mov     [stacks + 8 * rdx], rax
        inc     qword ptr [count]
        inc     qword ptr [depth]
        mov     rax, [depth]
        cmp     rax, [deepest]
        jbe     1f
        mov     [deepest], rax
1:      test    rdx, rdx
        jnz     2f
        call    [action]
2:      dec     qword ptr [depth]
        pop     rsi
        pop     rdx
        pop     rax
        iretq

do_nothing:
        ret

ask_for_another:
        call    wait_for_nmi_and_key
        mov     rax, [count]
        mov     [during], rax
        ret

ask_for_another_and_return_from_something:
        call    wait_for_nmi_and_key
        int     RETURNS
        mov     eax, 1000               # some time to notice
1:      dec     eax
        jnz     1b
        mov     rax, [count]
        mov     [during], rax
        ret

# Both change RAX, RDX, RSI.
wait_for_nmi:
        say     "please: nmi\n"
1:      cmp     qword ptr [count], 0
        je      1b
        ret

wait_for_nmi_and_key:
        say     "please: nmi and key\n"
        mov     dx, UART_LSR
1:      in      al, dx
        test    al, LSR_DATA_READY
        jz      1b
        mov     dx, UART_DATA
        in      al, dx
        ret

.macro begin what
        mov     qword ptr [action], offset \what
        mov     qword ptr [count], 0
        mov     qword ptr [deepest], 0
.endm

main:
        mov     word ptr [idt + 16 * NMI], offset on_nmi
        mov     byte ptr [idt + 16 * NMI + 4], 1

        experiment "An NMI comes though IF be 0, on the stack that its gate names"
        begin   do_nothing
        attempt
        call    wait_for_nmi
        caught  NOTHING
        check   "NMIs", [count], 1
        check   "stack", [stacks], "offset ist1_stack_top - 40"

        experiment "Another one waits until the handler has ended with IRET, and then comes at once"
        begin   ask_for_another
        attempt
        call    wait_for_nmi
        caught  NOTHING
        check   "NMIs before the IRET", [during], 1
        check   "NMIs after it", [count], 2
        check   "deepest", [deepest], 1
        check   "RIP of the second", [rips+8], [rips]
        check   "stack of the second", [stacks+8], [stacks]

        experiment "It waits for any IRET: one in the handler lets it in too early"
        mov     byte ptr [idt + 16 * NMI + 4], 0        # the second would overwrite the first one's frame
        begin   ask_for_another_and_return_from_something
        attempt
        call    wait_for_nmi
        caught  NOTHING
        check   "NMIs before the first one's IRET", [during], 2
        check   "NMIs after it", [count], 2
        check   "deepest", [deepest], 2

        experiment "Two that come while one is handled are one"
        begin   ask_for_two_more
        attempt
        call    wait_for_nmi
        caught  NOTHING
        check   "NMIs before the IRET", [during], 1
        check   "NMIs after it", [count], 2

        jmp     finish

ask_for_two_more:
        call    wait_for_nmi_and_key
        call    wait_for_nmi_and_key
        mov     rax, [count]
        mov     [during], rax
        ret
