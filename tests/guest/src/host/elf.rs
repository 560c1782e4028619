//! Changing the guest's image.

use super::Unavailable;

const PT_NOTE: u32 = 4;
/// XEN_ELFNOTE_PHYS32_ENTRY.
const PVH_NOTE: u32 = 18;

/// The same ELF file without its PVH note, so that a monitor enters it by the 64-bit Linux boot protocol.
///
/// # Errors
/// It is no 64-bit ELF file with such a note.
pub fn without_pvh(image: &[u8]) -> Result<Vec<u8>, Unavailable> {
    let mut changed = image.to_vec();
    let note = note_type(image).ok_or_else(|| Unavailable("no ELF file with a PVH note".into()))?;
    changed[note..note + 4].copy_from_slice(&0_u32.to_le_bytes());
    Ok(changed)
}

/// Offset of the note's type. The guest has one note.
fn note_type(image: &[u8]) -> Option<usize> {
    image.starts_with(b"\x7fELF\x02\x01").then_some(())?;
    let headers = usize::try_from(word64(image, 32)?).ok()?;
    let (size, count) = (usize::from(word16(image, 54)?), usize::from(word16(image, 56)?));
    (0..count).map(|number| headers + number * size).find_map(|header| {
        (word32(image, header)? == PT_NOTE).then_some(())?;
        let at = usize::try_from(word64(image, header + 8)?).ok()? + 8;
        (word32(image, at)? == PVH_NOTE).then_some(at)
    })
}

fn word16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn word32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn word64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}
