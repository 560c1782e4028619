//! The guest's only code at CPL 0: entry by either boot protocol, the way down to CPL 3, and the gates back up.
//!
//! KVM without hardware virtualization emulates CPL 0 at about a microsecond per instruction, so page tables and GDT
//! are data of the image and everything that Rust can do is done at CPL 3: it may write the IDT, the TSS, the page
//! tables and the interrupt controllers' registers, since every page is a user page.
//!
//! - `linux_entry`: 64-bit Linux boot protocol (Documentation/arch/x86/boot.rst), RSI = `boot_params`.
//! - `pvh_entry`: PVH (xen/include/public/arch-x86/hvm/start_info.h), 32-bit protected mode, EBX = `hvm_start_info`.
//! - Gate 3 (INT3): services for CPL 3, number in RAX, see [`crate::cpu`].
//! - Vectors 0–31: faults, turned into a call of [`crate::cpu::fault_entry`] at CPL 3.
//! - Vectors 32–63: interrupts, counted and acknowledged at the local APIC.

use core::arch::global_asm;

global_asm!(
    r#"
    .set CODE0, 0x08
    .set DATA0, 0x10
    .set DATA3, 0x1b
    .set CODE3, 0x23
    .set TASK, 0x28
    .set STACK_BYTES, 0x40000
    .set CR0_VALUE, 0x80010033          # PG, WP, NE, ET, MP, PE
    .set CR4_VALUE, 0x620               # OSXMMEXCPT, OSFXSR, PAE

    .section .note.pvh, "a", @note
    .balign 4
    .long 4, 8, 18                      # name and descriptor size, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad pvh_entry

    .section .text.entry, "ax"
    .code32
    .globl pvh_entry
pvh_entry:
    cli
    cld
    mov dword ptr [BOOT_POINTER], ebx
    mov dword ptr [BOOT_PROTOCOL], 2
    mov eax, CR4_VALUE
    mov cr4, eax
    mov eax, offset page_tables
    mov cr3, eax
    mov ecx, 0xc0000080                 # EFER
    rdmsr
    or eax, 0x100                       # LME
    wrmsr
    mov eax, CR0_VALUE
    mov cr0, eax
    lgdt [gdt_pointer]
    .byte 0xea                          # jmp CODE0:to_user
    .long to_user
    .word CODE0

    .code64
    .globl linux_entry
linux_entry:
    cli
    cld
    mov [rip + BOOT_POINTER], rsi
    mov dword ptr [rip + BOOT_PROTOCOL], 1
    mov eax, offset page_tables
    mov cr3, rax
    mov eax, CR4_VALUE
    mov cr4, rax
    mov eax, CR0_VALUE
    mov cr0, rax
    lgdt [rip + gdt_pointer]

to_user:
    mov eax, DATA0
    mov ss, eax
    mov eax, offset task_state
    mov word ptr [rip + gdt + TASK + 2], ax
    shr eax, 16
    mov byte ptr [rip + gdt + TASK + 4], al
    mov byte ptr [rip + gdt + TASK + 7], ah
    mov qword ptr [rip + task_state + 4], offset kernel_stack_end
    mov word ptr [rip + task_state + 0x66], 0x68
    mov byte ptr [rip + task_state + 0x2068], 0xff
    mov eax, TASK
    ltr ax
    lidt [rip + idt_pointer]
    mov esp, offset kernel_stack_end
    push DATA3
    push offset user_stack_end - 8      # as if called: RSP = 8 modulo 16 at a function's entry
    push 0x2                            # interrupts off
    push CODE3
    push offset guest_main
    iretq

    .globl service_gate
service_gate:
    test eax, eax
    jz 1f
    cmp eax, 1
    je 3f
    cmp eax, 2
    je 4f
    cmp eax, 3
    je 5f
    cmp eax, 4
    je 6f
    iretq
1:  cmp dword ptr [rip + IRQ_PENDING], 0  # 0: sleep until an interrupt; IF is clear up to the sti's shadow
    jne 2f
    sti
    hlt
2:  iretq
3:  or qword ptr [rsp + 16], 0x200      # 1: interrupts on at CPL 3
    iretq
4:  cli                                 # 2: halt for good
    hlt
    jmp 4b
5:  lock cmpxchg16b [rip + quad_word]   # 3: what this KVM may be unable to emulate; then code where no memory is
    mov eax, 0xd8000000
    jmp rax
6:  mov eax, ecx                        # 4: CPUID leaf ECX, subleaf 0
    xor ecx, ecx
    cpuid
    iretq

    .macro fault vector, error=0
    .balign 16
    .if \error == 0
    push 0
    .endif
    push \vector
    jmp fault_common
    .endm

    .balign 16
    .globl fault_stubs
fault_stubs:
    .set n, 0
    .rept 32
    .if (n == 8) || ((n >= 10) && (n <= 14)) || (n == 17) || (n == 21)
    fault n, 1
    .else
    fault n
    .endif
    .set n, n + 1
    .endr

fault_common:
    pop qword ptr [rip + FAULT]         # vector
    pop qword ptr [rip + FAULT + 8]     # error code
    mov rax, [rsp]
    mov [rip + FAULT + 16], rax         # RIP
    mov rax, cr2
    mov [rip + FAULT + 24], rax
    mov qword ptr [rsp], offset fault_entry
    mov qword ptr [rsp + 8], CODE3
    mov qword ptr [rsp + 16], 0x2
    mov qword ptr [rsp + 24], offset fault_stack_end - 8
    mov qword ptr [rsp + 32], DATA3
    iretq

    .balign 64
    .globl interrupt_stubs
interrupt_stubs:
    .set n, 0
    .rept 32
    .balign 64
    push rax
    inc dword ptr [rip + IRQ_COUNTS + 4 * n]
    mov dword ptr [rip + IRQ_PENDING], 1
    mov eax, 0xfee000b0                 # local APIC, end of interrupt
    mov dword ptr [rax], 0
    pop rax
    iretq
    .set n, n + 1
    .endr

    .section .data.pages, "aw"
    .balign 4096
    .globl page_tables
page_tables:
    .quad page_directory_pointers + 7
    .fill 511, 8, 0
    .globl page_directory_pointers
page_directory_pointers:
    .quad page_directory_0 + 7
    .quad page_directories + 7
    .quad page_directories + 0x1000 + 7
    .quad page_directories + 0x2000 + 7
    .fill 508, 8, 0
page_directory_0:
    .set n, 0
    .rept 512
    .quad n * 0x200000 + 0x87           # present, writable, user, 2 MiB
    .set n, n + 1
    .endr

    .section .data, "aw"
    .balign 16
gdt:
    .quad 0
    .quad 0x00af9b000000ffff            # code, DPL 0, 64-bit
    .quad 0x00cf93000000ffff            # data, DPL 0
    .quad 0x00cff3000000ffff            # data, DPL 3
    .quad 0x00affb000000ffff            # code, DPL 3, 64-bit
    .quad 0x0000890000002068            # TSS, base filled in at entry; limit covers the I/O bitmap
    .quad 0
gdt_pointer:
    .word gdt_pointer - gdt - 1
    .quad gdt
idt_pointer:
    .word 0xfff
    .quad IDT

    .section .bss.pages, "aw", @nobits
    .balign 4096
    .globl page_directories
page_directories:
    .skip 0x3000
task_state:
    .skip 0x3000                        # TSS, then an I/O bitmap of zeros: CPL 3 may use every port
    .skip 0x2000
kernel_stack_end:
    .skip 0x4000
fault_stack_end:
    .skip STACK_BYTES
user_stack_end:
    .balign 16
quad_word:
    .skip 16
    "#
);
