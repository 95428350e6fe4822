; guest.asm - the guest that vmmig's demo and tests run on the Unicorn engine.
;
; Real x86-64 machine code, without an operating system: it fills RAM with a pattern, computes
; a SHA-256 chain over it again and again while it changes that RAM, reports on the serial port
; and powers the machine off. What the digest must be, `expected_digest` in guest.py computes.
;
; Build:   nasm -f bin -o guest.bin guest.asm        (nasm 2.15 or newer)
;
; Loaded at:   guest-physical address 0x1000, which is also its entry point
; Entered in:  64-bit mode, addresses not translated, interrupts never
;              rdi = bytes of RAM, from address 0 on: a multiple of 64 KiB, at least 128 KiB
;              rsi = number of rounds, at least 1
;
; The chain. RAM from 64 KiB on is n blocks of 64 KiB.
;   Fill:    x is an xorshift64 generator (13, 7, 17) which starts at SEED. Block 0 is its first
;            8192 values, as little-endian words of 64 bits. Block i is block i - 1, each word
;            XORed with the generator's next value (one value for the whole block).
;   Digest:  32 bytes, zero at first. A round takes each block in order:
;                digest = SHA-256(digest || block)
;                block  = block XOR digest digest digest ...      (2048 times)
;   Result:  the digest after the last round.

bits 64
default rel
org 0x1000

COM1        equ 0x3f8                   ; 16550 serial port
PM1A_CNT    equ 0x604                   ; ACPI PM1a control: bit 13 is SLP_EN
PM_TMR      equ 0x608                   ; ACPI power-management timer, 3.579545 MHz, 32 bits
STACK_TOP   equ 0x10000
WORK        equ 0x10000                 ; the first block
BLOCK       equ 0x10000                 ; bytes of a block
SEED        equ 0x9e3779b97f4a7c15

start:
        mov     rsp, STACK_TOP
        cld
        mov     [ram_bytes], rdi
        mov     [rounds], rsi
        call    serial_init

        lea     rsi, [text_banner]
        call    print
        mov     rax, [ram_bytes]
        shr     rax, 10
        call    print_decimal
        lea     rsi, [text_kib]
        call    print
        mov     rax, [rounds]
        call    print_decimal
        lea     rsi, [text_rounds]
        call    print

        call    read_timer              ; the first reading of `check_timer`
        mov     [timer], eax

        lea     rsi, [text_fill]
        call    print
        call    fill
        lea     rsi, [text_done]
        call    print

        xor     ebp, ebp                ; ebp: rounds done
.round:
        lea     rsi, [text_round]
        call    print
        lea     rax, [rbp + 1]
        call    print_decimal
        mov     al, ' '
        call    print_char
        call    hash_all
        mov     al, ' '
        call    print_char
        mov     ecx, 4
        call    print_digest
        lea     rsi, [text_newline]
        call    print
        inc     rbp
        cmp     rbp, [rounds]
        jb      .round

        lea     rsi, [text_digest]
        call    print
        mov     ecx, 32
        call    print_digest
        lea     rsi, [text_bye]
        call    print

power_off:
        mov     dx, PM1A_CNT
        mov     ax, 1 << 13
        out     dx, ax
stop:
        hlt
        jmp     stop

; fill: RAM from WORK on with the pattern. Changes rax, rbx, rcx, rdx, rsi, rdi, r8.
fill:
        mov     rbx, SEED
        mov     edi, WORK
        mov     ecx, BLOCK / 8
.first:
        call    next_random
        mov     [rdi], rbx
        add     rdi, 8
        dec     ecx
        jnz     .first
        mov     rdx, [ram_bytes]
.block:
        cmp     rdi, rdx
        jae     .done
        call    next_random
        mov     r8, rdi
        lea     rsi, [rdi - BLOCK]
        mov     ecx, BLOCK / 8
        rep movsq
.word:
        xor     [r8], rbx
        add     r8, 8
        cmp     r8, rdi
        jb      .word
        jmp     .block
.done:
        ret

; next_random: the next value of xorshift64 in rbx. Changes rax.
next_random:
        mov     rax, rbx
        shl     rax, 13
        xor     rbx, rax
        mov     rax, rbx
        shr     rax, 7
        xor     rbx, rax
        mov     rax, rbx
        shl     rax, 17
        xor     rbx, rax
        ret

; hash_all: one round over all blocks, with a dot for each sixteenth of them.
; Changes everything but rbp and rsp.
hash_all:
        mov     rdi, [ram_bytes]
        sub     rdi, WORK
        shr     rdi, 4
        mov     [dot_bytes], rdi
        mov     rsi, WORK
        add     rdi, rsi
        mov     [dot_at], rdi
.block:
        call    hash_block
        call    mix_block
        add     rsi, BLOCK
        cmp     rsi, [dot_at]
        jb      .no_dot
        mov     rax, [dot_bytes]
        add     [dot_at], rax
        mov     al, '.'
        call    print_char
        call    check_timer
.no_dot:
        cmp     rsi, [ram_bytes]
        jb      .block
        ret

; mix_block: the block at rsi, XORed with the digest. Changes rax, rdi, xmm0 to xmm3.
mix_block:
        movdqu  xmm0, [digest]
        movdqu  xmm1, [digest + 16]
        mov     rdi, rsi
        lea     rax, [rsi + BLOCK]
.next:
        movdqa  xmm2, [rdi]
        movdqa  xmm3, [rdi + 16]
        pxor    xmm2, xmm0
        pxor    xmm3, xmm1
        movdqa  [rdi], xmm2
        movdqa  [rdi + 16], xmm3
        add     rdi, 32
        cmp     rdi, rax
        jb      .next
        ret

; hash_block: digest = SHA-256(digest || the block at rsi). The message is 1024 chunks of 64
; bytes, of which the first is the digest and the block's first 32 bytes, and a last one with
; the block's last 32 bytes and the padding. Changes everything but rsi, rbp and rsp.
hash_block:
        push    rsi
        mov     ecx, 8
.initial:
        mov     eax, [sha_initial + rcx * 4 - 4]
        mov     [state + rcx * 4 - 4], eax
        dec     ecx
        jnz     .initial

        lea     rdi, [chunk]            ; the first chunk
        mov     rbx, rsi
        lea     rsi, [digest]
        mov     ecx, 4
        rep movsq
        mov     rsi, rbx
        mov     ecx, 4
        rep movsq
        lea     rbx, [rsi + BLOCK - 64]
        mov     [last], rbx
        push    rsi
        lea     rsi, [chunk]
        call    compress
        pop     rsi
.middle:
        call    compress
        add     rsi, 64
        cmp     rsi, [last]
        jb      .middle

        lea     rdi, [chunk]            ; the last chunk
        mov     ecx, 4
        rep movsq
        lea     rsi, [sha_padding]
        mov     ecx, 4
        rep movsq
        lea     rsi, [chunk]
        call    compress

        mov     ecx, 8
.digest:
        mov     eax, [state + rcx * 4 - 4]
        bswap   eax
        mov     [digest + rcx * 4 - 4], eax
        dec     ecx
        jnz     .digest
        pop     rsi
        ret

; One round of SHA-256. %1 to %8: the registers that hold a to h; eax: the message word;
; %9: the round's constant. The new a is left in h's register, the new e in d's.
%macro sha_round 9
        lea     %8, [%8 + eax + %9]
        mov     ebx, %5                 ; sum 1 of e: its rotations by 6, 11 and 25
        ror     ebx, 14
        xor     ebx, %5
        ror     ebx, 5
        xor     ebx, %5
        ror     ebx, 6
        mov     ecx, %6                 ; e ? f : g
        xor     ecx, %7
        and     ecx, %5
        xor     ecx, %7
        add     %8, ebx
        add     %8, ecx
        add     %4, %8
        mov     ebx, %1                 ; sum 0 of a: its rotations by 2, 13 and 22
        ror     ebx, 9
        xor     ebx, %1
        ror     ebx, 11
        xor     ebx, %1
        ror     ebx, 2
        mov     ecx, %1                 ; the majority of a, b and c
        or      ecx, %2
        and     ecx, %3
        mov     edx, %1
        and     edx, %2
        or      ecx, edx
        add     %8, ebx
        add     %8, ecx
%endmacro

; The message word of round %1 into eax, and into the schedule, of which 16 words are kept.
%macro sha_word 1
%if %1 < 16
        mov     eax, [rsi + (%1) * 4]
        bswap   eax
%else
        mov     ebx, [schedule + ((%1 - 15) & 15) * 4]
        mov     eax, ebx                ; its rotations by 7 and 18, and shifted by 3
        ror     eax, 11
        xor     eax, ebx
        ror     eax, 7
        shr     ebx, 3
        xor     eax, ebx
        mov     ebx, [schedule + ((%1 - 2) & 15) * 4]
        mov     ecx, ebx                ; its rotations by 17 and 19, and shifted by 10
        ror     ecx, 2
        xor     ecx, ebx
        ror     ecx, 17
        shr     ebx, 10
        xor     ecx, ebx
        add     eax, ecx
        add     eax, [schedule + ((%1 - 7) & 15) * 4]
        add     eax, [schedule + (%1 & 15) * 4]
%endif
        mov     [schedule + (%1 & 15) * 4], eax
%endmacro

%macro sha_rounds 8                     ; eight rounds of constants
        sha_word  i
        sha_round r8d, r9d, r10d, r11d, r12d, r13d, r14d, r15d, %1
        sha_word  i + 1
        sha_round r15d, r8d, r9d, r10d, r11d, r12d, r13d, r14d, %2
        sha_word  i + 2
        sha_round r14d, r15d, r8d, r9d, r10d, r11d, r12d, r13d, %3
        sha_word  i + 3
        sha_round r13d, r14d, r15d, r8d, r9d, r10d, r11d, r12d, %4
        sha_word  i + 4
        sha_round r12d, r13d, r14d, r15d, r8d, r9d, r10d, r11d, %5
        sha_word  i + 5
        sha_round r11d, r12d, r13d, r14d, r15d, r8d, r9d, r10d, %6
        sha_word  i + 6
        sha_round r10d, r11d, r12d, r13d, r14d, r15d, r8d, r9d, %7
        sha_word  i + 7
        sha_round r9d, r10d, r11d, r12d, r13d, r14d, r15d, r8d, %8
%assign i i + 8
%endmacro

; compress: the 64 bytes at rsi into `state`. Changes everything but rsi, rdi, rbp and rsp.
compress:
        mov     r8d, [state]
        mov     r9d, [state + 4]
        mov     r10d, [state + 8]
        mov     r11d, [state + 12]
        mov     r12d, [state + 16]
        mov     r13d, [state + 20]
        mov     r14d, [state + 24]
        mov     r15d, [state + 28]
%assign i 0
        sha_rounds 0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, \
                   0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5
        sha_rounds 0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, \
                   0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174
        sha_rounds 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, \
                   0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da
        sha_rounds 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, \
                   0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967
        sha_rounds 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, \
                   0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85
        sha_rounds 0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, \
                   0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070
        sha_rounds 0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, \
                   0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3
        sha_rounds 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, \
                   0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2
        add     [state], r8d
        add     [state + 4], r9d
        add     [state + 8], r10d
        add     [state + 12], r11d
        add     [state + 16], r12d
        add     [state + 20], r13d
        add     [state + 24], r14d
        add     [state + 28], r15d
        ret

; read_timer: the power-management timer in eax. Changes rdx.
read_timer:
        mov     dx, PM_TMR
        in      eax, dx
        ret

; check_timer: goes on if time did not run backwards since the last reading. Changes rax, rdx.
check_timer:
        call    read_timer
        mov     edx, eax
        sub     edx, [timer]
        mov     [timer], eax
        js      .backwards
        ret
.backwards:
        lea     rsi, [text_backwards]
        call    print
        jmp     power_off

; serial_init: 115200 baud, 8N1, FIFOs on, polled. The port's scratch register and its
; loopback are tried first; a machine whose port fails them stops here.
serial_init:
        mov     dx, COM1 + 7
        mov     al, 0x5a
        out     dx, al
        in      al, dx
        cmp     al, 0x5a
        jne     stop
        mov     dx, COM1 + 3            ; line control: the divisor's latch is accessible
        mov     al, 0x80
        out     dx, al
        mov     dx, COM1
        mov     al, 1
        out     dx, al
        inc     dx
        mov     al, 0
        out     dx, al
        mov     dx, COM1 + 3            ; 8 bits, no parity, 1 stop bit
        mov     al, 0x03
        out     dx, al
        mov     dx, COM1 + 1            ; no interrupts
        mov     al, 0
        out     dx, al
        inc     dx                      ; FIFOs on and empty
        mov     al, 0x07
        out     dx, al
        mov     dx, COM1 + 4            ; loopback: what is sent is received
        mov     al, 0x1e
        out     dx, al
        mov     dx, COM1
        mov     al, 0xae
        out     dx, al
        in      al, dx
        cmp     al, 0xae
        jne     stop
        mov     dx, COM1 + 4            ; no loopback, DTR and RTS on
        mov     al, 0x03
        out     dx, al
        ret

; print_char: the character in al. Changes rdx.
print_char:
        push    rax
        mov     dx, COM1 + 5
.wait:
        in      al, dx
        test    al, 0x20                ; is the transmitter's holding register empty?
        jz      .wait
        pop     rax
        mov     dx, COM1
        out     dx, al
        ret

; print: the text at rsi, which ends with a zero byte. Changes rax, rdx, rsi.
print:
        lodsb
        test    al, al
        jz      .done
        call    print_char
        jmp     print
.done:
        ret

; print_decimal: the number in rax. Changes rax, rcx, rdx, rbx.
print_decimal:
        mov     ebx, 10
        xor     ecx, ecx
.divide:
        xor     edx, edx
        div     rbx
        push    rdx
        inc     ecx
        test    rax, rax
        jnz     .divide
.digit:
        pop     rax
        add     al, '0'
        call    print_char
        dec     ecx
        jnz     .digit
        ret

; print_digest: the first ecx bytes of the digest, in hexadecimal. Changes rax, rcx, rdx, rsi,
; rbx.
print_digest:
        lea     rsi, [digest]
        lea     rbx, [text_hex]
.byte:
        lodsb
        push    rax
        shr     al, 4
        xlatb
        call    print_char
        pop     rax
        and     al, 15
        xlatb
        call    print_char
        dec     ecx
        jnz     .byte
        ret

text_banner:    db 'vmmig guest: ', 0
text_kib:       db ' KiB of RAM, ', 0
text_rounds:    db ' rounds', 10, 0
text_fill:      db 'filling RAM', 0
text_done:      db ', done', 10, 0
text_round:     db 'round ', 0
text_newline:   db 10, 0
text_digest:    db 'digest ', 0
text_bye:       db 10, 'power off', 10, 0
text_backwards: db 10, 'the timer ran backwards', 10, 0
text_hex:       db '0123456789abcdef'

        align   16, db 0
sha_initial:
        dd      0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a
        dd      0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19
sha_padding:                            ; a one bit, zeros, and the message's length in bits:
        db      0x80                    ; (32 + 65536) * 8 = 0x80100
        times   28 db 0
        db      0x08, 0x01, 0x00

        align   4096, db 0              ; not in a page with code: the engine watches those
digest:         times 32 db 0
state:          times 8 dd 0
schedule:       times 16 dd 0
chunk:          times 64 db 0
last:           dq 0
dot_at:         dq 0
dot_bytes:      dq 0
ram_bytes:      dq 0
rounds:         dq 0
timer:          dd 0
