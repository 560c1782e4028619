use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::devices::virtio::testing::{BUFFERS, Driver, WRITE, hostile};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

/// A console with a file and a socket.
struct Place {
    directory: TempDir,
}

impl Place {
    fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn config(&self) -> ConsoleConfig {
        ConsoleConfig {
            output_path: Some(self.path("out")),
            socket_path: Some(self.path("socket")),
            size: Some(ConsoleSize { columns: 80, rows: 24 }),
            ..ConsoleConfig::default()
        }
    }

    fn console(&self) -> Box<VirtioConsole> {
        Box::new(VirtioConsole::open(&self.config()).unwrap())
    }

    fn client(&self) -> UnixStream {
        UnixStream::connect(self.path("socket")).unwrap()
    }

    fn output(&self) -> Vec<u8> {
        std::fs::read(self.path("out")).unwrap()
    }
}

/// Gives the device a buffer for input and returns what it put there.
fn input(driver: &mut Driver, room: u32) -> Vec<u8> {
    let head = driver.chain(RECEIVE, &[(BUFFERS, room, WRITE)]);
    driver.kick(RECEIVE);
    let (id, length) = driver.wait_used(RECEIVE);
    assert_eq!(id, u32::from(head));
    driver.bytes(BUFFERS, length as usize)
}

fn output(driver: &mut Driver, bytes: &[u8]) {
    driver.fill(BUFFERS + 0x1000, bytes);
    driver.chain(TRANSMIT, &[(BUFFERS + 0x1000, bytes.len() as u32, 0)]);
    driver.kick(TRANSMIT);
    assert_eq!(driver.wait_used(TRANSMIT).1, 0);
}

#[test]
fn output_goes_to_the_file_and_to_clients_and_their_bytes_are_input() {
    let place = Place::new();
    let mut driver = Driver::running(place.console(), 1 << VIRTIO_CONSOLE_F_SIZE);
    assert_eq!(driver.read(0x100), 24 << 16 | 80);
    output(&mut driver, b"before ");
    let mut client = place.client();
    client.write_all(b"typed").unwrap();
    assert_eq!(input(&mut driver, 16), b"typed", "the client is known now");
    output(&mut driver, b"after");
    let mut seen = [0; 5];
    client.read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"after");
    assert_eq!(place.output(), b"before after");
    // Longer than the buffer: the rest comes with the next.
    client.write_all(b"0123456789").unwrap();
    let mut all = Vec::new();
    while all.len() < 10 {
        all.extend(input(&mut driver, 4));
    }
    assert_eq!(all, b"0123456789");
}

#[test]
fn input_that_no_buffer_was_there_for_survives_a_reset_and_a_snapshot() {
    let place = Place::new();
    let mut driver = Driver::running(place.console(), 0);
    let mut client = place.client();
    client.write_all(b"kept").unwrap();
    // Taken in when the client is known, which an output proves.
    driver.wait("the client's output", |driver| {
        output(driver, b"x");
        client.set_nonblocking(true).unwrap();
        client.read(&mut [0; 64]).ok()
    });
    driver.start(0);
    assert_eq!(input(&mut driver, 2), b"ke");
    drop(client);
    let mut driver = driver.reloaded(|| place.console());
    assert_eq!(input(&mut driver, 16), b"pt");
}

#[test]
fn a_sender_is_held_back_while_the_guest_takes_nothing() {
    let place = Place::new();
    let mut driver = Driver::running(place.console(), 0);
    let mut client = place.client();
    client.set_nonblocking(true).unwrap();
    let bytes: Vec<u8> = (0..4 << 20).map(|at| (at / 251) as u8).collect();
    let mut sent = 0;
    let mut send = |client: &mut UnixStream| {
        while let Ok(n @ 1..) = client.write(&bytes[sent..]) {
            sent += n;
        }
        sent
    };
    driver.wait("full socket", |_| {
        let before = send(&mut client);
        std::thread::sleep(Duration::from_millis(5));
        (send(&mut client) == before).then_some(())
    });
    let sent = send(&mut client);
    assert!(sent < bytes.len(), "the socket took everything");
    let mut received = Vec::new();
    while received.len() < sent {
        received.extend(input(&mut driver, 4096));
    }
    assert!(received == bytes[..sent], "bytes were lost or changed");
}

#[test]
fn a_buffer_gives_at_most_so_much_and_a_broken_chain_nothing() {
    let place = Place::new();
    let config = ConsoleConfig { log_limit_bytes: Some(64 << 20), ..place.config() };
    let mut driver = Driver::running(Box::new(VirtioConsole::open(&config).unwrap()), 0);
    let piece = 0x8_0000;
    let long = driver.chain(TRANSMIT, &[(BUFFERS, piece, 0); 4]);
    let broken = driver.chain(TRANSMIT, &[(BUFFERS, 8, WRITE), (BUFFERS, 8, 0)]);
    driver.kick(TRANSMIT);
    assert_eq!(driver.wait_used(TRANSMIT), (long.into(), 0));
    assert_eq!(driver.wait_used(TRANSMIT), (broken.into(), 0));
    assert_eq!(place.output().len(), MAX_OUTPUT);
}

#[test]
fn the_end_of_the_process_removes_the_socket() {
    let place = Place::new();
    let console = place.console();
    let mut closer = console.closer().unwrap();
    let _driver = Driver::running(console, 0);
    closer.finish();
    assert!(!place.path("socket").exists());
    assert!(VirtioConsole::open(&place.config()).is_ok());
}

#[test]
fn a_limit_needs_a_file() {
    let place = Place::new();
    let config = ConsoleConfig { output_path: None, log_limit_bytes: Some(1 << 20), ..place.config() };
    assert!(VirtioConsole::open(&config).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn whatever_a_driver_does_the_console_works_after_a_reset(
        receive in hostile::abuse(),
        transmit in hostile::abuse(),
    ) {
        let place = Place::new();
        let mut driver = Driver::running(place.console(), 0);
        place.client().write_all(b"something").unwrap();
        hostile::inflict(&mut driver, RECEIVE, &receive);
        hostile::inflict(&mut driver, TRANSMIT, &transmit);
        driver.start(0);
        output(&mut driver, b"still here");
        prop_assert!(place.output().ends_with(b"still here"));
    }
}
