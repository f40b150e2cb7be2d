# disk.s: a driver for a virtio disk with its registers in memory, by polling and by interrupts.
#
# Mirrors: Virtual I/O Device (VIRTIO) Version 1.2, sections 2.7 "Split virtqueues", 3.1.1 "Driver requirements: device
# initialization", 4.2 "Virtio over MMIO" and 5.2 "Block device".
#
# base.inc says how experiments work. The assembler is told where the registers are (VIRTIO). The device has IRQ 5, and
# a disk of SECTORS sectors; each byte of sector n is n + 1, but for sector CODE_SECTOR, which begins with instructions:
#
#       mov     eax, 0x22222222
#       ret

.include "base.inc"

.equ IRQ, 5
.equ PIC1_COMMAND, 0x20
.equ PIC1_DATA, 0x21

# Registers.
.equ MAGIC, VIRTIO + 0x00
.equ VERSION, VIRTIO + 0x04
.equ DEVICE_ID, VIRTIO + 0x08
.equ DEVICE_FEATURES, VIRTIO + 0x10
.equ DEVICE_FEATURES_SEL, VIRTIO + 0x14
.equ DRIVER_FEATURES, VIRTIO + 0x20
.equ DRIVER_FEATURES_SEL, VIRTIO + 0x24
.equ QUEUE_SEL, VIRTIO + 0x30
.equ QUEUE_NUM, VIRTIO + 0x38
.equ QUEUE_READY, VIRTIO + 0x44
.equ QUEUE_NOTIFY, VIRTIO + 0x50
.equ INTERRUPT_STATUS, VIRTIO + 0x60
.equ INTERRUPT_ACK, VIRTIO + 0x64
.equ STATUS, VIRTIO + 0x70
.equ QUEUE_DESC, VIRTIO + 0x80
.equ QUEUE_DRIVER, VIRTIO + 0x90
.equ QUEUE_DEVICE, VIRTIO + 0xA0
.equ CAPACITY, VIRTIO + 0x100

.equ ACKNOWLEDGE, 1
.equ DRIVER, 2
.equ DRIVER_OK, 4
.equ FEATURES_OK, 8
.equ NEEDS_RESET, 64

.equ F_FLUSH, 1 << 9
.equ F_VERSION_1, 1 << 0                # of bits 32 to 63

.equ USED_BUFFER, 1                     # why there is an interrupt
.equ CONFIG_CHANGE, 2

.equ NEXT, 1                            # of a descriptor
.equ WRITE, 2

.equ IN_, 0                             # requests; IN and OUT are instructions
.equ OUT_, 1
.equ FLUSH, 4
.equ GET_ID, 8
.equ NO_SUCH_REQUEST, 99

.equ S_OK, 0
.equ S_IOERR, 1
.equ S_UNSUPP, 2

.equ QUEUE_SIZE, 8
.equ SECTOR, 512
.equ NO_INTERRUPT, 1                    # in the available ring

.section .bss
.balign 16
descriptors:    .skip 16 * QUEUE_SIZE
available:      .skip 4 + 2 * QUEUE_SIZE        # u16 flags, u16 idx, the ring
.balign 4
used:           .skip 4 + 8 * QUEUE_SIZE        # u16 flags, u16 idx, the ring of u32 id, u32 len
.balign 16
header:         .skip 16                # u32 type, u32 reserved, u64 sector
buffer:         .skip SECTOR
second:         .skip SECTOR
status:         .skip 4
interrupts:     .skip 4                 # how many have come
cause:          .skip 4                 # of the last one

.irp number, 0, 1, 2, 3, 4, 5, 6, 7
vector IRQ_\number, INTERRUPT_GATE_32, KERNEL_CODE, device_interrupt
.endr

.section .text
device_interrupt:
        push    eax
        push    edx
        mov     eax, ds:[INTERRUPT_STATUS]
        mov     [cause], eax
        mov     ds:[INTERRUPT_ACK], eax
        inc     dword ptr [interrupts]
        out_byte PIC1_COMMAND, 0x20     # end of interrupt
        pop     edx
        pop     eax
        iretd

.macro set register, value
        mov     dword ptr ds:[\register], \value
.endm

.macro set_table register, address
        set     \register, "offset \address"
        set     "\register+4", 0
.endm

# From reset to the first request. Changes EAX, ECX, EDI.
start_device:
        set     STATUS, 0
        set     STATUS, ACKNOWLEDGE
        set     STATUS, ACKNOWLEDGE|DRIVER
        set     DRIVER_FEATURES_SEL, 0
        set     DRIVER_FEATURES, F_FLUSH
        set     DRIVER_FEATURES_SEL, 1
        set     DRIVER_FEATURES, F_VERSION_1
        set     STATUS, ACKNOWLEDGE|DRIVER|FEATURES_OK
        mov     edi, offset descriptors
        mov     ecx, (header - descriptors) / 4
        xor     eax, eax
        rep stosd
        set     QUEUE_SEL, 0
        set     QUEUE_NUM, QUEUE_SIZE
        set_table QUEUE_DESC, descriptors
        set_table QUEUE_DRIVER, available
        set_table QUEUE_DEVICE, used
        set     QUEUE_READY, 1
        set     STATUS, ACKNOWLEDGE|DRIVER|FEATURES_OK|DRIVER_OK
        ret

# Describes a buffer.
.macro describe number, address, length, flags, next=0
        mov     dword ptr [descriptors + 16 * \number], offset \address
        mov     dword ptr [descriptors + 16 * \number + 8], \length
        mov     dword ptr [descriptors + 16 * \number + 12], (\flags) | (\next) << 16
.endm

# Makes a request of three buffers in descriptors 0 to 2, or of two without data in between: `flags` says which way
# those go. Changes EAX, EDX.
.macro request type, sector, data=header, length=0, flags=0
        mov     dword ptr [header], \type
        mov     dword ptr [header + 8], \sector
        mov     dword ptr [status], 0xEE
    .if \length
        describe 0, header, 16, NEXT, 1
        describe 1, \data, \length, NEXT|(\flags), 2
    .else
        describe 0, header, 16, NEXT, 2
    .endif
        describe 2, status, 1, WRITE
        call    offer
.endm

# Makes the chain that begins with descriptor 0 available, and notifies the device. Changes EAX, EDX.
offer:
        movzx   eax, word ptr [available + 2]
        mov     edx, eax
        and     edx, QUEUE_SIZE - 1
        mov     word ptr [available + 4 + 2 * edx], 0
        inc     eax
        mov     [available + 2], ax     # (a processor of this kind stores in order)
        set     QUEUE_NOTIFY, 0
        ret

# Waits for all that was made available. Changes EAX.
poll:
1:      mov     ax, [available + 2]
        cmp     ax, [used + 2]
        jne     1b
        ret

# Waits for one interrupt more than there have been, ECX.
await_interrupt:
        cli
        cmp     [interrupts], ecx
        jne     1f
        sti
        hlt
        jmp     await_interrupt
1:      ret

# What the used ring says of the last request: how many bytes were written. In EAX.
written:
        movzx   eax, word ptr [used + 2]
        dec     eax
        and     eax, QUEUE_SIZE - 1
        mov     eax, [used + 4 + 8 * eax + 4]
        ret

main:
        experiment "The registers say what it is"
        check   "magic", ds:[MAGIC], 0x74726976
        check   "version", ds:[VERSION], 2
        check   "device", ds:[DEVICE_ID], 2

        experiment "Version 1 and flushes are offered"
        set     DEVICE_FEATURES_SEL, 0
        check_bits "features", ds:[DEVICE_FEATURES], F_FLUSH, F_FLUSH
        set     DEVICE_FEATURES_SEL, 1
        check_bits "features", ds:[DEVICE_FEATURES], F_VERSION_1, F_VERSION_1

        experiment "The configuration tells the capacity"
        check   "capacity", ds:[CAPACITY], SECTORS
        check   "its upper half", ds:[CAPACITY+4], 0

        experiment "The device takes the features, and is ready"
        call    start_device
        check   "status", ds:[STATUS], ACKNOWLEDGE|DRIVER|FEATURES_OK|DRIVER_OK
        check   "queue", ds:[QUEUE_READY], 1

# ---- by polling -----------------------------------------------------------------------------------------------------

        mov     word ptr [available], NO_INTERRUPT

        experiment "A sector is read"
        request IN_, 3, buffer, SECTOR, WRITE
        call    poll
        check   "status", [status], S_OK
        check   "its beginning", [buffer], 0x04040404
        check   "its end", [buffer+SECTOR-4], 0x04040404
        check   "what is behind", [second], 0
        call    written
        check   "length", eax, SECTOR+1

        experiment "A sector is written, and is read again"
        mov     edi, offset buffer
        mov     ecx, SECTOR / 4
        mov     eax, 0x12345678
        rep stosd
        request OUT_, 5, buffer, SECTOR, 0
        call    poll
        check   "status", [status], S_OK
        call    written
        check   "length", eax, 1
        request IN_, 5, second, SECTOR, WRITE
        call    poll
        check   "status", [status], S_OK
        mov     edi, offset second
        mov     ecx, SECTOR / 4
        mov     eax, 0x12345678
        repe scasd
        check   "what is left to be compared", ecx, 0

        experiment "The sectors beside it are what they were"
        request IN_, 4, buffer, 2*SECTOR, WRITE
        call    poll
        check   "before", [buffer+SECTOR-4], 0x05050505
        check   "the sector", [buffer+SECTOR], 0x12345678
        request IN_, 6, buffer, SECTOR, WRITE
        call    poll
        check   "behind", [buffer], 0x07070707

        experiment "A flush is done"
        request FLUSH, 0
        call    poll
        check   "status", [status], S_OK

        experiment "The disk has a serial number"
        request GET_ID, 0, buffer, 20, WRITE
        call    poll
        check   "status", [status], S_OK
        check   "mini", [buffer], 0x696E696D
        check   "-bhy", [buffer+4], 0x7968622D

        experiment "A request that is not known is not supported"
        request NO_SUCH_REQUEST, 0
        call    poll
        check   "status", [status], S_UNSUPP

        experiment "A sector that is not on the disk is an error"
        request IN_, SECTORS, buffer, SECTOR, WRITE
        call    poll
        check   "status", [status], S_IOERR
        request OUT_, SECTORS-1, buffer, 2*SECTOR, 0
        call    poll
        check   "status", [status], S_IOERR

        experiment "The driver did not want to be interrupted"
        check   "cause", ds:[INTERRUPT_STATUS], 0

# ---- by interrupts --------------------------------------------------------------------------------------------------

        mov     word ptr [available], 0
        out_byte PIC1_COMMAND, 0x11     # ICW1: edge triggered; ICW4 will come
        out_byte PIC1_DATA, 0x20        # ICW2: first vector
        out_byte PIC1_DATA, 0b00000100  # ICW3: the second PIC hangs on line 2
        out_byte PIC1_DATA, 0x01        # ICW4: 8086 mode
        out_byte PIC1_DATA, ~(1 << IRQ) & 0xFF

        experiment "An interrupt tells that a request is done"
        xor     ecx, ecx
        request IN_, 9, buffer, SECTOR, WRITE
        call    await_interrupt
        check   "cause", [cause], USED_BUFFER
        check   "status", [status], S_OK
        check   "the sector", [buffer], 0x0A0A0A0A
        check   "cause after it was acknowledged", ds:[INTERRUPT_STATUS], 0

        experiment "So it is with the next one"
        mov     ecx, [interrupts]
        request IN_, 10, buffer, SECTOR, WRITE
        call    await_interrupt
        check   "status", [status], S_OK
        check   "the sector", [buffer], 0x0B0B0B0B

        experiment "Code that is read from the disk over other code is what runs then"
        call    overwritten
        check   "before", eax, 0x11111111
        mov     ecx, [interrupts]
        request IN_, CODE_SECTOR, overwritten, SECTOR, WRITE
        call    await_interrupt
        call    overwritten
        check   "then", eax, 0x22222222

        experiment "A chain without end stops the device, and an interrupt tells so"
        describe 0, header, 16, NEXT, 1
        describe 1, buffer, SECTOR, NEXT|WRITE, 1
        mov     ecx, [interrupts]
        call    offer
        call    await_interrupt
        check_bits "cause", [cause], CONFIG_CHANGE, CONFIG_CHANGE
        check_bits "status of the device", ds:[STATUS], NEEDS_RESET, NEEDS_RESET

        experiment "After a reset it goes on"
        call    start_device
        check_bits "status of the device", ds:[STATUS], NEEDS_RESET, 0
        mov     ecx, [interrupts]
        request IN_, 11, buffer, SECTOR, WRITE
        call    await_interrupt
        check   "status", [status], S_OK
        check   "the sector", [buffer], 0x0C0C0C0C

        call    report
        lidt    [no_interrupts]         # not every machine has a port that resets it: a triple fault does everywhere
        int3

.section .data
no_interrupts:  .word 0
                .long 0

.section .text.last                     # a sector is read over this and what is behind
.balign 16
overwritten:
        mov     eax, 0x11111111
        ret
        .skip   SECTOR - 6
