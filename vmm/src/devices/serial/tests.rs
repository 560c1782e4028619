use mote_vmm_api::TokenBucket;
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::*;

/// Line control, with the bit that puts the divisor in the place of the data.
const LINE_CONTROL: u64 = 3;
const DIVISOR: u8 = 0x80;
const LINE_STATUS: u64 = 5;
/// Both transmitters are empty.
const READY: u8 = 0x60;

#[test]
fn output_beyond_the_limit_is_dropped_and_counted_and_the_guest_does_not_wait() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("out");
    let limit = TokenBucket { size: 10, one_time_burst: Some(5), refill_time: 3_600_000 };
    let config = SerialConfig {
        serial_out_path: Some(path.clone()),
        rate_limiter: Some(limit),
        ..SerialConfig::default()
    };
    let irq = EventFd::new(EFD_NONBLOCK).unwrap();
    let (mut serial, _sources) = Serial::new(Some(&config), irq).unwrap();
    let counted = || (UART.write_count.total(), UART.rate_limiter_dropped_bytes.total());
    let before = counted();
    for byte in b"0123456789" {
        serial.write(DATA, &[*byte]);
    }
    // The divisor is no output.
    serial.write(LINE_CONTROL, &[DIVISOR]);
    serial.write(DATA, &[1; 20]);
    serial.write(LINE_CONTROL, &[0]);
    serial.write(DATA, b"abcdefghij\n");
    let mut status = [0];
    serial.read(LINE_STATUS, &mut status);
    assert_eq!(status[0] & READY, READY);
    serial.pause();
    assert_eq!(std::fs::read(&path).unwrap(), b"0123456789abcde");
    let after = counted();
    assert_eq!((after.0 - before.0, after.1 - before.1), (15, 6));
    let missed = UART.missed_write_count.total();
    serial.write(REGISTERS, &[0]);
    assert_eq!(UART.missed_write_count.total() - missed, 1);
}

#[test]
fn output_without_a_limit_is_all_there() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("out");
    let config = SerialConfig { serial_out_path: Some(path.clone()), ..SerialConfig::default() };
    let (mut serial, _sources) = Serial::new(Some(&config), EventFd::new(EFD_NONBLOCK).unwrap()).unwrap();
    let text = [b'x'; 5000];
    serial.write(DATA, &text);
    serial.pause();
    assert_eq!(std::fs::read(&path).unwrap(), text);
}
