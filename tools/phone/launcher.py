"""A program of a phone's ABI that starts another one: a real ELF file of some 200 bytes, for what tests push.

It replaces itself by a program that is already on the phone (execve) with the arguments and environment it was given.
"""

import struct

MACHINES = {"arm64-v8a": 183, "x86_64": 62}  # e_machine
_BASE = 0x400000
_HEADERS = 64 + 56  # one ELF header, one program header


def launcher(abi: str, program: str) -> bytes:
    """The ELF file.

    Args:
        abi: a key of MACHINES.
        program: the absolute path on the phone; exit status 126 if it cannot be started.
    """
    path = program.encode() + b"\0"
    content = {"arm64-v8a": _aarch64, "x86_64": _x86_64}[abi]() + path
    size = _HEADERS + len(content)
    identification = b"\x7fELF" + bytes([2, 1, 1, 0]) + bytes(8)  # 64 bits, little endian, version 1, System V
    # e_type ET_EXEC, machine, version, entry, program headers' and section headers' offset, flags, sizes and counts
    header = struct.pack("<HHIQQQIHHHHHH", 2, MACHINES[abi], 1, _BASE + _HEADERS, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, 0x1000)  # PT_LOAD, readable and executable
    return identification + header + segment + content


def _aarch64() -> bytes:
    """The path follows the code. At the start, the stack holds argc, argv, 0, environment, 0."""
    code = (
        0xF94003E3,  # ldr x3, [sp]
        0x910023E1,  # add x1, sp, #8            argv
        0x8B030C22,  # add x2, x1, x3, lsl #3
        0x91002042,  # add x2, x2, #8            environment
        0x100000C0,  # adr x0, #24               the path
        0xD2801BA8,  # mov x8, #221              execve
        0xD4000001,  # svc #0
        0xD2800FC0,  # mov x0, #126
        0xD2800BA8,  # mov x8, #93               exit
        0xD4000001,  # svc #0
    )
    return struct.pack(f"<{len(code)}I", *code)


def _x86_64() -> bytes:
    """As `_aarch64`."""
    start = bytes.fromhex(
        "488b0c24"  # mov rcx, [rsp]
        "488d742408"  # lea rsi, [rsp+8]         argv
        "488d54ce08"  # lea rdx, [rsi+rcx*8+8]   environment
    )
    end = bytes.fromhex(
        "b83b000000"  # mov eax, 59              execve
        "0f05"  # syscall
        "bf7e000000"  # mov edi, 126
        "b83c000000"  # mov eax, 60              exit
        "0f05"  # syscall
    )
    return start + b"\x48\x8d\x3d" + struct.pack("<i", len(end)) + end  # lea rdi, [rip + path]
