; A multiboot kernel for QEMU: fills RAM with what does not compress, says R on port E9h, and then
; either halts, or dirties one word in each page of 64 MiB, over and over, at some 64 MiB a second.
; nasm -f bin -DRAM_MIB=1024 -DDIRTY=1 dirtying_guest.asm -o guest.bin
bits 32
org 0x100000

header:
    dd 0x1BADB002               ; multiboot magic
    dd 0x00010000               ; the addresses below are valid
    dd -(0x1BADB002 + 0x00010000)
    dd header, header, end, end, start

start:
    cld
    mov edi, 0x1000000
    mov ecx, ((RAM_MIB - 32) << 20) / 4
    mov eax, 0x9E3779B9
fill:
    imul eax, eax, 1664525
    add eax, 1013904223
    mov [edi], eax
    add edi, 4
    dec ecx
    jnz fill
    mov al, 'R'
    out 0xE9, al
%if DIRTY
again:
    mov edi, 0x1000000
    mov ecx, (64 << 20) / 4096
page:
    inc dword [edi]
    add edi, 4096
    mov edx, 20000
spin:
    dec edx
    jnz spin
    dec ecx
    jnz page
    jmp again
%else
    cli
idle:
    hlt
    jmp idle
%endif
end:
