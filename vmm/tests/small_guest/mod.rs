//! Guests of a few bytes of machine code.

/// `mov dx, port; mov al, value; out dx, al` in 32- or 64-bit mode.
pub fn out(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x66, 0xba, low, high, 0xb0, value, 0xee]
}

/// Stops for good: `cli; hlt; jmp`.
pub const HALT: [u8; 4] = [0xfa, 0xf4, 0xeb, 0xfd];
/// First port of the serial port.
pub const SERIAL: u16 = 0x3f8;

/// Says `byte` on the serial port, goes on with `rest`, and stops.
pub fn say_then(byte: u8, rest: &[u8]) -> Vec<u8> {
    [&out(SERIAL, byte), rest, &HALT].concat()
}

/// An ELF of one segment at 1 MiB that starts at its first byte; with a PVH note if `pvh`.
pub fn elf(code: &[u8], pvh: bool) -> Vec<u8> {
    const BASE: u64 = 0x10_0000;
    const HEADERS: u64 = 64 + 2 * 56;
    let mut bytes = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    bytes.extend([BASE, 64, 0].iter().flat_map(|word| word.to_le_bytes()));
    bytes.extend(0u32.to_le_bytes());
    bytes.extend([64u16, 56, 2, 0, 0, 0].iter().flat_map(|word| word.to_le_bytes()));
    let note = if pvh {
        [&[4u32, 4, 18].map(u32::to_le_bytes).concat()[..], b"Xen\0", &(BASE as u32).to_le_bytes()].concat()
    } else {
        Vec::new()
    };
    let mut header = |kind: u32, offset: u64, address: u64, size: u64, memory: u64| {
        bytes.extend([kind, 7].iter().flat_map(|word| word.to_le_bytes()));
        bytes.extend([offset, address, address, size, memory, 4].iter().flat_map(|word| word.to_le_bytes()));
    };
    let (length, notes) = (code.len() as u64, note.len() as u64);
    header(1, HEADERS, BASE, length, length.max(4096));
    header(4, HEADERS + length, 0, notes, notes);
    [&bytes, code, &note].concat()
}
