# double_faults.s: which exceptions become a double fault when the first cannot be delivered, and what is beyond.
#
# Mirrors: Intel SDM volume 3A, section 6.15, "Interrupt 8 - Double Fault Exception (#DF)", tables 6-4 and 6-5.
#
#       first \ second   benign     contributory   page fault        contributory: #DE #TS #NP #SS #GP
#       benign           second     second         second
#       contributory     second     #DF            second
#       page fault       second     #DF            #DF
#       #DF              second     the end        the end
#
# The second exception comes from the first one's gate: it is not present (#NP), leads to no code (#GP), or leads to
# level 1, whose stack is no good (#TS) or not there (#PF).

.include "base.inc"
.include "pages.inc"

segment CODE_1_0, 0b10111010
segment DATA_1_0, 0b10110010
.equ DATA_1, DATA_1_0 + 1
.equ NOWHERE, 0x00800000                # there is no page

.section .data
.balign 4
zero_to_one:
        .long   0, 1

# What is wrong with the gate of an exception from now on. Changes EAX.
.macro absent vector
        mov     byte ptr [idt + 8 * \vector + 5], INTERRUPT_GATE_32
.endm
.macro to_data vector
        mov     word ptr [idt + 8 * \vector + 2], KERNEL_DATA
.endm
.macro to_level_1 vector, stack_segment, stack
        mov     word ptr [idt + 8 * \vector + 2], CODE_1_0
        mov     dword ptr [tss_ss1], \stack_segment
        mov     dword ptr [tss_esp1], offset \stack
.endm
.macro mended vector
        mov     byte ptr [idt + 8 * \vector + 5], PRESENT + INTERRUPT_GATE_32
        mov     word ptr [idt + 8 * \vector + 2], KERNEL_CODE
.endm

.section .text
main:
        call    paging_on

# ---- a benign one first ---------------------------------------------------------------------------------------------

        experiment "Benign, then contributory: the second is delivered"
        to_data BR
        attempt
        mov     eax, -1
1:      bound   eax, [zero_to_one]
        caught  GP, error=KERNEL_DATA+EXT, eip=1b
        mended  BR

        experiment "Benign, then a page fault: the second is delivered"
        to_level_1 BR, DATA_1, NOWHERE
        attempt ring=3
        mov     eax, -1
1:      bound   eax, [zero_to_one]
        caught  PF, error=PF_WRITE, eip=1b, ring=3
        check   "CR2", [seen_cr2], NOWHERE-4
        mended  BR

# ---- a contributory one first ---------------------------------------------------------------------------------------

        .macro double_fault_of_division what:vararg
        \what
        attempt ring=3
        xor     ecx, ecx
1:      div     ecx
        caught  DF, error=0, eip=1b, ring=3
        mended  DE
        .endm

        experiment "#DE, then #NP: a double fault, with error code 0"
        double_fault_of_division absent DE
        experiment "#DE, then #GP"
        double_fault_of_division to_data DE
        experiment "#DE, then #TS"
        double_fault_of_division to_level_1 DE, DATA_1_0, stack_top

        experiment "#GP, then #NP"
        absent  GP
        attempt ring=3
1:      hlt
        caught  DF, error=0, eip=1b, ring=3
        mended  GP

        experiment "#NP, then #NP: an INT n through a gate that is not there, and #NP's is not either"
        absent  NP
        absent  OF
        attempt
1:      int     OF
        caught  DF, error=0, eip=1b
        mended  NP
        mended  OF

        experiment "#DE, then a page fault: the second is delivered"
        to_level_1 DE, DATA_1, NOWHERE
        attempt ring=3
        xor     ecx, ecx
1:      div     ecx
        caught  PF, error=PF_WRITE, eip=1b, ring=3
        check   "CR2", [seen_cr2], NOWHERE-4
        mended  DE

# ---- a page fault first ---------------------------------------------------------------------------------------------

        .macro double_fault_of_page what:vararg
        \what
        attempt ring=3
1:      mov     al, ds:[NOWHERE]
        caught  DF, error=0, eip=1b, ring=3
        mended  PF
        .endm

        experiment "A page fault, then #NP"
        double_fault_of_page absent PF
        check   "CR2", [seen_cr2], NOWHERE
        experiment "A page fault, then #GP"
        double_fault_of_page to_data PF
        experiment "A page fault, then #TS"
        double_fault_of_page to_level_1 PF, DATA_1_0, stack_top
        experiment "A page fault, then another: CR2 has the second"
        double_fault_of_page to_level_1 PF, DATA_1, NOWHERE-0x1000
        check   "CR2", [seen_cr2], NOWHERE-0x1004

# ---- three ----------------------------------------------------------------------------------------------------------

        experiment "Benign, then contributory, then contributory: a double fault"
        to_data BR
        absent  GP
        attempt
        mov     eax, -1
1:      bound   eax, [zero_to_one]
        caught  DF, error=0, eip=1b
        mended  BR
        mended  GP

        experiment "Contributory, then a page fault, then contributory: a double fault"
        to_level_1 DE, DATA_1, NOWHERE
        absent  PF
        attempt ring=3
        xor     ecx, ecx
1:      div     ecx
        caught  DF, error=0, eip=1b, ring=3
        mended  DE
        mended  PF

        # The last: a double fault that cannot be delivered shuts the processor down, and the machine resets it.
        call    report
        absent  DE
        absent  DF
        xor     ecx, ecx
        div     ecx
        write   "FAIL The processor goes on after a triple fault\n"
        jmp     leave
